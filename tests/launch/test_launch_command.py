from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.config import InputError
from horoyolo.launch.command import LAUNCHERS, build_command, direct_command, horovodrun_command, launcher_folder, mpirun_command
from horoyolo.launch.hosts import Host, local_hosts
from horoyolo.launch.interface import interface_of, interface_to, own_address
from horoyolo.launch.job import Job
from horoyolo.launch.remote import Ssh

JOB = Job(2, ("python", "-m", "horoyolo", "train"), env={"OMP_NUM_THREADS": "1", "B": "x y"})
TWO, UNEVEN = [Host("gpu1", 2), Host("gpu2", 2)], [Host("gpu1", 2), Host("gpu2", 1)]
CLUSTER_JOB = Job(
    num_workers=4,
    argv=("/opt/horoyolo/bin/python", "-m", "horoyolo", "train", "--data", "my data/blood.yaml", "--name", "it's $HOME"),
    env={"NCCL_DEBUG": "INFO", "PATH": "/usr/bin", "NCCL_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": "1,0"},
    nic="eth0",
    ssh=Ssh(port=2222, identity="/home/ann/.ssh/cluster"),
    cwd="/home/ann/my runs",
    as_root=True,
)
OPEN = replace(CLUSTER_JOB, env={"NCCL_DEBUG": "INFO"}, nic="", ssh=Ssh(), cwd="")
CASES = {
    "horovodrun-gloo": (CLUSTER_JOB, TWO, "horovodrun"),
    "horovodrun-mpi": (replace(CLUSTER_JOB, transport="mpi"), TWO, "horovodrun"),
    "horovodrun-plain": (replace(OPEN, nic="eth0"), TWO, "horovodrun"),
    "mpirun": (CLUSTER_JOB, TWO, "mpirun"),
    "mpirun-plain": (OPEN, TWO, "mpirun"),
    "mpirun-many": (replace(OPEN, num_workers=64), [Host(f"n{number}", 1) for number in range(64)], "mpirun"),
    "hydra": (CLUSTER_JOB, TWO, "hydra"),
    "hydra-uneven": (replace(CLUSTER_JOB, num_workers=3), UNEVEN, "hydra"),
    "fewer-workers": (replace(OPEN, num_workers=3, nic="eth0"), TWO, "horovodrun"),
    "one-worker-elsewhere": (replace(OPEN, num_workers=1, nic="eth0"), TWO, "horovodrun"),
    "local-horovodrun": (JOB, local_hosts(2), "horovodrun"),
    "local-horovodrun-mpi": (replace(JOB, transport="mpi", nic="eth0", cwd="/somewhere"), local_hosts(2), "horovodrun"),
    "local-mpirun": (JOB, local_hosts(2), "mpirun"),
    "local-hydra": (JOB, local_hosts(2), "hydra"),
    "local-one": (replace(JOB, num_workers=1), local_hosts(1), "mpirun"),
}


@pytest.mark.parametrize("case", CASES)
def test_command_lines(case, equals_file):
    job, hosts, launcher = CASES[case]
    equals_file("".join(f"{shlex.quote(word)}\n" for word in build_command(job, hosts, launcher)), f"argv-{case}.txt")


def test_every_launcher_has_command_lines_and_every_file_its_case():
    assert {launcher for _, _, launcher in CASES.values()} == LAUNCHERS.keys()
    golden = Path(__file__).with_name("golden")
    assert {path.name for path in golden.glob("argv-*")} == {f"argv-{case}.txt" for case in CASES}


def test_single_commands_need_no_checks():
    assert horovodrun_command(JOB, local_hosts(2)) == build_command(JOB, local_hosts(2), "horovodrun")
    assert mpirun_command(JOB, local_hosts(2)) == build_command(JOB, local_hosts(2), "mpirun")
    assert direct_command(JOB, local_hosts(1)) == list(JOB.argv)


def test_horovodrun_starts_where_nothing_needs_quotes():
    assert launcher_folder(TWO, "horovodrun") == "/"
    assert launcher_folder(local_hosts(2), "horovodrun") is None
    assert launcher_folder(TWO, "mpirun") is None


@pytest.mark.parametrize(
    ("changed", "hosts", "launcher", "message"),
    [
        ({}, TWO, "ssh", r"unknown launcher 'ssh' \(--launcher\): known are horovodrun, mpirun, hydra"),
        ({"num_workers": 5}, TWO, "mpirun", "5 workers .* but 4 slots on 2 hosts"),
        ({"transport": "nccl"}, TWO, "horovodrun", r"unknown transport 'nccl' \(--transport\): known are gloo, mpi"),
        ({"nic": ""}, TWO, "horovodrun", "horovodrun between hosts needs --nic"),
        ({"nic": "eth0,eth1"}, TWO, "horovodrun", "'eth0,eth1' is no interface"),
        ({"nic": "$(reboot)"}, TWO, "mpirun", "is no interface"),
        ({"nic": "-x"}, TWO, "hydra", "is no interface"),
        ({"ssh": Ssh(identity="/a b/key")}, TWO, "horovodrun", r"can't be told the key file '/a b/key' safely: .*ssh/config"),
        ({"ssh": Ssh(identity="/a/$(reboot)")}, TWO, "mpirun", "key file"),
        ({"env": {"A;reboot": "1"}}, TWO, "horovodrun", "'A;reboot' in the environment"),
        ({"env": {"OMPI_MCA_btl": "$(reboot)"}}, TWO, "mpirun", r"OMPI_MCA_btl='\$\(reboot\)'"),
        ({"argv": ("train", ":", "reboot")}, TWO, "mpirun", "':' as a word of its own"),
        ({"argv": ("/a=b/python", "x")}, TWO, "horovodrun", "because of the '='"),
        ({}, [Host("fe80::1", 2), Host("a", 2)], "mpirun", r"mpirun takes no IPv6 address \(fe80::1\)"),
        ({}, [Host("localhost", 2), Host("a", 2)], "horovodrun", "localhost among other hosts"),
        ({}, [Host("a", 2, port=22), Host("b", 2, port=23)], "mpirun", r"ssh ports differ between hosts \(22, 23\)"),
    ],
)
def test_what_a_launcher_cannot_be_told_is_refused(changed, hosts, launcher, message):
    with pytest.raises(InputError, match=message) as caught:
        build_command(replace(CLUSTER_JOB, **changed), hosts, launcher)
    assert "\n" not in str(caught.value)


def test_settings_of_open_mpi_matter_where_it_starts_workers():
    job = replace(CLUSTER_JOB, env={"OMPI_MCA_btl": "a b"})
    assert build_command(job, TWO, "horovodrun")
    for launcher, transport in (("horovodrun", "mpi"), ("mpirun", "gloo")):
        with pytest.raises(InputError, match="OMPI_MCA_btl='a b'"):
            build_command(replace(job, transport=transport), TWO, launcher)


@pytest.mark.parametrize(
    ("nic", "said", "told"),
    [
        ("eth0", [], ["btl_tcp_if_include", "oob_tcp_if_include"]),
        ("eth0", ["btl_tcp_if_exclude"], ["oob_tcp_if_include"]),
        ("eth0", ["oob_tcp_if_include"], ["btl_tcp_if_include", "oob_tcp_if_include"]),
        ("", [], ["btl_tcp_if_exclude", "oob_tcp_if_exclude"]),
        ("", ["btl_tcp_if_include", "oob_tcp_if_exclude"], []),
    ],
)
def test_open_mpi_is_told_interfaces_or_exceptions_not_both(nic, said, told):
    job = replace(CLUSTER_JOB, nic=nic, env={f"OMPI_MCA_{name}": "lo" for name in said})
    assert [word for word in mpirun_command(job, TWO) if "tcp_if" in word and "OMPI" not in word] == told


def test_the_port_of_the_hosts_is_sshs():
    hosts = [replace(host, port=2200) for host in TWO]
    assert build_command(CLUSTER_JOB, hosts, "horovodrun")[8:10] == ["-p", "2200"]


anything = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=25, deadline=None)
@given(st.lists(anything, max_size=4), anything, st.dictionaries(st.sampled_from(["A", "OMP_NUM_THREADS", "NCCL_DEBUG"]), anything, min_size=1))
def test_the_shells_of_horovod_take_words_and_variables_as_they_are(tmp_path_factory, words, name, env):
    """What horovodrun's own code makes of a job, run by two shells as it is on another host: by that of this machine, and behind ssh."""
    gloo_run = pytest.importorskip("horovod.runner.gloo_run", reason="Horovod is not installed (scripts/setup.sh builds it)")
    from horovod.runner.common.util.hosts import SlotInfo
    from horovod.runner.util.remote import get_remote_command

    root = tmp_path_factory.mktemp("shells")
    cwd = root / f"x {name.replace('/', '|')}"
    cwd.mkdir()
    (root / "ssh").write_text('#!/bin/sh\nshift $(($# - 1))\nexec sh -c "$1"\n')
    (root / "ssh").chmod(0o755)
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"
    job = Job(2, (sys.executable, "-Ic", show, *words), env=env, nic="eth0", cwd=str(cwd))
    argv = build_command(job, [Host("gpu1", 1), Host("gpu2", 1)], "horovodrun")
    worker = argv[argv.index("--disable-cache") + 1 :]

    run_command = gloo_run.get_run_command(worker, "10.0.0.1", {job.nic}, 1234)
    slot = SlotInfo("gpu2", 1, 0, 0, 2, 1, 1)
    text = gloo_run._slot_info_to_command_fn(run_command, dict(job.env))(slot)
    folder = launcher_folder([Host("gpu1", 1), Host("gpu2", 1)], "horovodrun")
    remote = get_remote_command(shlex.quote(f"cd {folder} > /dev/null 2>&1 ; {text}"), host="gpu2")
    done = subprocess.run(remote, shell=True, env={"PATH": f"{root}:{os.environ['PATH']}"}, cwd=root, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    seen_words, seen_cwd, seen_env = json.loads(done.stdout)
    assert seen_words == words
    assert seen_cwd == str(cwd)
    assert {key: seen_env[key] for key in env} == env
    assert {path.name for path in root.iterdir()} == {"ssh", cwd.name}


def test_no_interface_leads_to_hosts_that_are_here_or_nowhere(monkeypatch):
    assert interface_to(local_hosts(2)) == ""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: (_ for _ in ()).throw(OSError("no such name")))
    assert interface_to([Host("nowhere", 1)]) == ""
    assert interface_of("") == ""  # also where an interface has no address


def test_the_interface_is_the_one_that_the_kernel_would_send_by():
    assert interface_of(own_address("127.0.0.2")) == "lo"
    assert interface_to([Host("127.0.0.2", 1)]) == ""  # by whatever address this machine is named, it is here


def test_launching_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import horoyolo.launch.run, horoyolo.launch.script, horoyolo.launch.slurm"
    subprocess.run([sys.executable, "-c", code], check=True)
