from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.config import InputError
from horoyolo.launch.command import build_command
from horoyolo.launch.environment import SSH_WRAPPER, job_env
from horoyolo.launch.hosts import Host, local_hosts, read_hostfile
from horoyolo.launch.job import Job
from horoyolo.launch.remote import Ssh
from horoyolo.launch.script import render_script

ROOT = Path(__file__).parents[2]
HERE = {"PATH": "/usr/local/bin:/usr/bin:/bin", "NCCL_DEBUG": "WARN", "HOME": "/home/ann", "AWS_SECRET_ACCESS_KEY": "s3cret"}
TRAIN = ("train", "--data", "data/blood.yaml", "--cfg", "yolov5s", "--batch", "128", "--epochs", "100", "--sync-bn")
PREFIX = "/opt/horoyolo"  # where the examples have it


def example(hosts: list[Host], launcher: str, **changed) -> str:
    """A script that does not depend on where this checkout lies."""
    num_workers = sum(host.slots for host in hosts)
    job = Job(num_workers, (f"{PREFIX}/bin/python", "-m", "horoyolo", *TRAIN), job_env(hosts, 32, HERE), nic="eth0", cwd="/home/ann/blood")
    text = render_script(replace(job, **changed), hosts, launcher, HERE)
    return text.replace(str(SSH_WRAPPER), f"{PREFIX}/launch/bin").replace(str(Path(sys.executable).parent), f"{PREFIX}/bin")


UNEVEN = [Host("node1", 1), Host("node2", 2)]
BOXES = read_hostfile(ROOT / "hostfiles" / "four-boxes.txt")


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_the_scripts_to_read_are_those_that_launch_writes(launcher, equals_file):
    file = ROOT / "scripts" / f"train_{launcher}.sh"
    equals_file(example(BOXES, launcher), file)
    assert os.access(file, os.X_OK)


@pytest.mark.parametrize(
    ("name", "hosts", "launcher", "changed"),
    [
        ("horovodrun-mpi", UNEVEN, "horovodrun", {"transport": "mpi", "ssh": Ssh(2222, "/keys/a"), "cwd": "/it's $HOME"}),
        ("mpirun-root", UNEVEN, "mpirun", {"as_root": True, "nic": "", "env": {"A": "x\ny 'z'"}}),
        ("hydra", [Host("node1", 2), Host("node2", 2)], "hydra", {}),
        ("hydra-uneven", UNEVEN, "hydra", {}),
        ("local", local_hosts(4), "horovodrun", {}),
        ("local-one", local_hosts(1), "horovodrun", {"argv": ("python", "-m", "horoyolo", *TRAIN), "cwd": "/a b"}),
    ],
)
def test_whole_scripts(name, hosts, launcher, changed, equals_file):
    equals_file(example(hosts, launcher, **changed), f"script-{name}.txt")


def test_no_secret_is_in_a_script():
    assert "s3cret" not in example(BOXES, "horovodrun") + example(BOXES, "mpirun")


def test_a_script_that_cannot_be_safe_is_not_written():
    with pytest.raises(InputError, match="no interface"):
        example(BOXES, "horovodrun", nic="$(reboot)")


STUB = f"""#!{sys.executable} -I
import json, os, sys
json.dump([sys.argv, os.getcwd(), dict(os.environ)], open("OUT", "w"))
"""
anything = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=25)
variables = st.dictionaries(st.sampled_from(["A", "NCCL_DEBUG", "OMP_NUM_THREADS"]), anything, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["horovodrun", "mpirun", "hydra"]), st.booleans(), st.lists(anything, max_size=5), anything, variables)
def test_bash_gives_the_launcher_exactly_its_words_and_variables(tmp_path_factory, launcher, local, words, name, env):
    """The script is run by bash, with a launcher that notes what it was given."""
    root = tmp_path_factory.mktemp("script")
    folder = root / f"x {name.replace('/', '|')}"
    folder.mkdir()
    out = root / "out.json"
    for program in ("horovodrun", "mpirun", "mpiexec.hydra"):
        (root / program).write_text(STUB.replace("OUT", str(out)))
        (root / program).chmod(0o755)
    hosts = local_hosts(3) if local else [Host("gpu1", 2), Host("gpu2", 1)]
    words = [word for word in words if word != ":"]
    job = Job(3, ("python", "train", *words), env, "gloo", "eth0", cwd=str(folder))
    script = root / "run.sh"
    text = render_script(job, hosts, launcher, {"PATH": f"{root}:/usr/bin:/bin"})
    # The stub has to be found before the launchers of this Python.
    script.write_text(text.replace(f"{Path(sys.executable).parent}:", f"{root}:"), newline="")

    around = {"PATH": os.environ["PATH"], "SSH_AUTH_SOCK": "/tmp/agent $x", "AWS_SECRET_ACCESS_KEY": "s3cret", "SLURM_JOB_ID": "1 2", "EDITOR": "vi"}
    done = subprocess.run(["bash", str(script)], cwd=root, env=around, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    argv, cwd, seen = json.loads(out.read_text())
    assert argv[1:] == build_command(job, hosts, launcher)[1:]
    assert cwd == ("/" if launcher == "horovodrun" and not local else str(folder))
    assert {key: seen[key] for key in env} == env
    assert seen["SSH_AUTH_SOCK"] == around["SSH_AUTH_SOCK"]
    if not local:
        assert not {"AWS_SECRET_ACCESS_KEY", "EDITOR"} & seen.keys()
        assert ("SLURM_JOB_ID" in seen) == (launcher != "horovodrun")
    assert len(list(root.iterdir())) == 6  # nothing else was made
