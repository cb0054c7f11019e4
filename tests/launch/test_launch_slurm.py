from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.config import InputError
from horoyolo.launch.environment import worker_env
from horoyolo.launch.hosts import Host
from horoyolo.launch.job import Job
from horoyolo.launch.slurm import SlurmOptions, describe_slurm, render_batch, slurm_options, srun_command
from horoyolo.launch.status import STATUS_DIR

ROOT = Path(__file__).parents[2]
TRAIN = ("train", "--data", "data/blood.yaml", "--cfg", "yolov5s", "--batch", "128", "--epochs", "300", "--name", "blood")
ENV = {"HOROVOD_FUSION_THRESHOLD": "0", "NCCL_DEBUG": "WARN"}
FULL = SlurmOptions(nodes=2, gpus_per_node=8, cpus_per_task=8, time="12:00:00", partition="gpu", account="vision")
CASES = {
    "horovodrun": (TRAIN, FULL, "horovodrun"),
    "mpirun": (TRAIN, FULL, "mpirun"),
    "least": (TRAIN[:3], SlurmOptions(), "slurm"),
    "array": (TRAIN, SlurmOptions(nodes=2, tasks_per_node=4, array="0-4%2", job_name="seeds"), "slurm"),
    "array-without-a-name": (TRAIN[:3], SlurmOptions(array="0-4"), "horovodrun"),
    "pyxis": (TRAIN, SlurmOptions(nodes=2, gpus_per_node=8, container_image="/images/it's.sqsh", container_mounts="/data:/data:ro"), "slurm"),
    "apptainer": (TRAIN, SlurmOptions(nodes=2, gpus_per_node=8, apptainer="/images/horoyolo 1.sif"), "slurm"),
    "quotes": (("train", "--data", "it's $HOME/`id`\n.yaml", "--name=a b", "--resume", "auto"), SlurmOptions(), "slurm"),
}


def test_the_script_to_read_is_the_one_that_launch_writes(equals_file):
    env = {"NCCL_DEBUG": "WARN", **worker_env(8, None, {})}
    equals_file(render_batch(TRAIN, FULL, "slurm", env, "/home/ann/blood", "/opt/horoyolo/bin/python"), ROOT / "scripts" / "train_slurm.sbatch")


@pytest.mark.parametrize("case", CASES)
def test_whole_scripts(case, equals_file):
    train, options, launcher = CASES[case]
    folder = "/home/ann/blood" if options.in_container else "/home/ann/it's $HERE"
    equals_file(render_batch(train, options, launcher, ENV, folder, "/opt/horoyolo/bin/python"), f"sbatch-{case}.txt")


def test_an_elastic_job_outlives_nodes():
    text = render_batch(TRAIN, SlurmOptions(nodes=4, tasks_per_node=2), "slurm", {}, "/a", "python", ["--min-np", "3"])
    assert "#SBATCH --no-kill\n" in text
    assert f'python -m horoyolo launch --slurm --min-np 3 -- {shlex.join(TRAIN[:-2])} --name "$run" --resume auto &\n' in text
    with pytest.raises(InputError, match="containers"):
        render_batch(TRAIN, SlurmOptions(apptainer="a.sif"), "slurm", {}, "/a", "python", ["--min-np", "3"])


def test_srun_inside_an_allocation():
    even, uneven = [Host("n1", 2), Host("n2", 2)], [Host("n1", 2), Host("n2", 1)]
    job = Job(4, ("python", "-m", "horoyolo", "train"), cwd="/a b")
    start = ["srun", "--mpi=pmix", "--kill-on-bad-exit=1"]
    assert srun_command(job, even, SlurmOptions(cpus_per_task=3)) == [
        *(*start, "--cpus-per-task=3", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=n1,n2", "--chdir=/a b"),
        *job.argv,
    ]
    assert srun_command(Job(3, ("w",)), uneven, SlurmOptions()) == [
        *(*start, "--cpu-bind=none", "--nodes=2", "--ntasks=3", "--distribution=arbitrary", "--nodelist=n1,n1,n2", "w"),
    ]
    inside = srun_command(Job(4, ("w",), cwd="/a"), even, SlurmOptions(container_image="img", container_mounts="/data:/data"))
    assert inside[-5:] == ["--chdir=/a", "--container-image=img", "--container-mounts=/a:/a,/data:/data", "--container-workdir=/a", "w"]
    env = {STATUS_DIR: "/tmp/notes"}
    noted = srun_command(Job(4, ("w",), env=env, cwd="/a"), even, SlurmOptions(apptainer="a.sif"))
    assert noted[-8:] == ["apptainer", "exec", "--bind", "/a:/a,/tmp/notes:/tmp/notes", "--pwd", "/a", "a.sif", "w"]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("", 180), ("2", 30), ("2:30", 37), ("0:04:00", 60), ("1:00:00", 180), ("0-1", 180), ("0-0:10", 150), ("0-00:00:40", 10), ("600", 180)],
)
def test_the_signal_leaves_most_of_the_time_for_work(time, seconds):
    assert SlurmOptions(time=time).signal_s == seconds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodes": 0}, "--nodes 0: at least 1 is wanted"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1"),
        ({"time": "soon"}, r"--time 'soon': MINUTES"),
        ({"partition": "a\n#SBATCH --x"}, "--partition"),
        ({"account": "a b"}, "--account 'a b': a name is wanted"),
        ({"job_name": "$(x)"}, "--job-name"),
        ({"array": "0-4;x"}, "--array"),
        ({"container_image": "a", "apptainer": "b"}, "one container is wanted"),
    ],
)
def test_options_that_slurm_would_not_take(given, message):
    with pytest.raises(InputError, match=message) as caught:
        SlurmOptions(**given)
    assert len(str(caught.value).splitlines()) == 1


def test_flags_become_options():
    parser = argparse.ArgumentParser()
    describe_slurm(parser)
    parser.add_argument("--slurm", action="store_true")
    assert slurm_options(parser.parse_args([])) == SlurmOptions()
    with pytest.raises(InputError, match="--gpus-per-node: it belongs to --slurm"):
        slurm_options(parser.parse_args(["--gpus-per-node", "8"]))
    words = ["--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "8", "--time", "12:00:00", "--partition", "gpu", "--account", "vision"]
    assert slurm_options(parser.parse_args(["--slurm", *words])) == FULL
    others = {"h", "help", "", "slurm"}
    assert {name.replace("_", "-") for name in vars(SlurmOptions())} == {flag[2:] for flag in parser._option_string_actions} - others


@pytest.mark.parametrize(
    ("train", "options", "launcher", "folder", "message"),
    [
        (TRAIN, FULL, "hydra", "/a", r"unknown launcher 'hydra' \(--launcher\) for a batch script: known are slurm, horovodrun, mpirun"),
        (TRAIN, SlurmOptions(apptainer="a.sif"), "mpirun", "/a", "containers .* go with --launcher slurm"),
        (TRAIN, SlurmOptions(apptainer="a.sif"), "slurm", "/a b", "can't be shown to a container"),
        ((*TRAIN, "--resume", "runs/x"), FULL, "slurm", "/a", "--resume runs/x: .*--resume auto"),
    ],
)
def test_what_does_not_go_together(train, options, launcher, folder, message):
    with pytest.raises(InputError, match=message):
        render_batch(train, options, launcher, {}, folder)


SRUN = f"""#!{sys.executable} -I
import json, os, pathlib, sys, time
json.dump([sys.argv, os.getcwd(), dict(os.environ)], open("{{root}}/srun.json.part", "w"))
os.rename("{{root}}/srun.json.part", "{{root}}/srun.json")
plan = os.environ.get("PLAN", "0")
if "stop" in plan:
    while not os.path.exists("{{root}}/scancel.txt"):
        time.sleep(0.02)
if "note" in plan:
    pathlib.Path(os.environ["HOROYOLO_STATUS_DIR"], "status.n1.7").write_text("75")
    sys.exit(0)
sys.exit(int(plan[-1]))
"""
NOTE = '#!/bin/sh\nprintf "%s\\n" "$@" > "{root}/{name}.txt"\n'


@pytest.fixture
def start_batch(tmp_path):
    """``start_batch(plan)`` runs a batch script by bash, with an srun that does as ``plan`` says; scancel and scontrol leave their words."""
    processes = []

    def start(plan: str) -> subprocess.Popen:
        write_stubs(tmp_path)
        script = tmp_path / "job.sh"
        script.write_text(render_batch(TRAIN, FULL, "slurm", {}, str(tmp_path), sys.executable))
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PLAN": plan}
        processes.append(subprocess.Popen(["bash", str(script)], env=env, cwd=tmp_path))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def write_stubs(root: Path) -> None:
    for name, text in (("srun", SRUN), ("scancel", NOTE), ("scontrol", NOTE)):
        (root / name).write_text(text.replace("{root}", str(root)).replace("{name}", name))
        (root / name).chmod(0o755)


@pytest.mark.parametrize(("plan", "status"), [("0", 0), ("1", 1), ("2", 2), ("note", 75)])
def test_a_job_that_nobody_stopped_is_not_requeued(plan, status, start_batch, tmp_path):
    assert start_batch(plan).wait(30) == status
    assert not (tmp_path / "scontrol.txt").exists()
    assert not list(tmp_path.glob(".status-*"))


@pytest.mark.parametrize(("plan", "status", "requeued"), [("stop note", 75, True), ("stop 0", 0, False), ("stop 1", 1, False)])
def test_only_a_job_that_stopped_with_a_checkpoint_at_its_limit_is_requeued(plan, status, requeued, start_batch, tmp_path):
    process = start_batch(plan)
    wait_until((tmp_path / "srun.json").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == status
    assert (tmp_path / "scancel.txt").read_text().split() == ["--signal=TERM", "7"]
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "7"]


def test_a_job_that_somebody_stops_saves_and_is_not_requeued(start_batch, tmp_path):
    process = start_batch("stop note")
    wait_until((tmp_path / "srun.json").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert (tmp_path / "scancel.txt").read_text().split() == ["--signal=TERM", "7"]
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.mark.parametrize(("job", "requeued"), [(': > "$HOROYOLO_TOO_FEW"; exit 75', True), ("exit 75", False), ("exit 1", False), ("exit 0", False)])
def test_an_elastic_job_is_requeued_when_it_stopped_for_want_of_nodes_alone(job, requeued, tmp_path):
    """75 by itself says that somebody stopped it: by a file STOP in the folder of its run, say."""
    write_stubs(tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{job}\n")
    python.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(render_batch(TRAIN, FULL, "slurm", {}, str(tmp_path), str(python), ["--min-np", "2"]))
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(script)], env=env, check=False, timeout=30)
    assert done.returncode == (75 if "75" in job else int(job[-1]))
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert not list(tmp_path.glob(".too-few*"))


def wait_until(condition, timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


anything = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=20, deadline=None)
@given(st.lists(anything, max_size=4), anything, anything, anything)
def test_bash_gives_srun_exactly_its_words_and_variables(tmp_path_factory, words, place, name, value):
    root = tmp_path_factory.mktemp("batch")
    write_stubs(root)
    folder = root / f"x {place.replace('/', '|')}"
    folder.mkdir()
    words = [f"w{word}" for word in words]  # not a --name of their own
    script = root / "job.sh"
    script.write_text(render_batch(["train", *words, "--name", f"n{name}"], SlurmOptions(), "slurm", {"A": value}, str(folder), "true"), newline="")
    env = {"PATH": f"{root}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    subprocess.run(["bash", str(script)], cwd=root, env=env, capture_output=True, check=False)
    argv, cwd, seen = json.loads((root / "srun.json").read_text())
    train = ["true", "-m", "horoyolo", "train", *words, "--name", f"n{name}-3", "--resume", "auto"]
    assert argv[1:] == ["--mpi=pmix", "--kill-on-bad-exit=1", "--cpu-bind=none", *train]
    assert cwd == str(folder)
    assert seen["A"] == value
    assert {path.name for path in root.iterdir()} == {"srun", "scancel", "scontrol", "srun.json", "job.sh", folder.name}
