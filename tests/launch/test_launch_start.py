"""What the flags of ``launch`` become."""

from __future__ import annotations

import argparse
import os
import shlex

import pytest

from horoyolo.config import InputError
from horoyolo.launch.flags import describe_launch
from horoyolo.launch.hosts import Host, parse_host_list
from horoyolo.launch.interface import own_address
from horoyolo.launch.remote import is_this_machine
from horoyolo.launch.start import build_job, launch, with_one_name_here, write_script
from horoyolo.launch.status import STATUS_DIR

HERE = os.uname().nodename
ADDRESS = own_address("198.51.100.1") or HERE  # by which others may reach this machine; there may be none


@pytest.mark.parametrize(
    ("hosts", "meant"),
    [
        ("198.51.100.1:2,127.0.0.2:1", [Host("198.51.100.1", 2), Host(HERE, 1)]),
        (f"127.0.0.2:1,198.51.100.1:2,{HERE}:3", [Host(HERE, 4), Host("198.51.100.1", 2)]),
        (f"198.51.100.1:2,{ADDRESS}:1,{HERE}:3", [Host("198.51.100.1", 2), Host(ADDRESS, 4)]),
        ("localhost:1,198.51.100.1:2", [Host(HERE, 1), Host("198.51.100.1", 2)]),
        ("127.0.0.2:1,localhost:2", [Host("localhost", 3)]),
        ("198.51.100.1:2,203.0.113.1:2", [Host("198.51.100.1", 2), Host("203.0.113.1", 2)]),
    ],
)
def test_this_machine_is_one_host_whatever_it_is_called(hosts, meant):
    assert with_one_name_here(parse_host_list(hosts)) == meant


@pytest.mark.parametrize("name", ["a..b", "a" * 64, f"b.{'a' * 64}.c"])
def test_what_is_no_name_at_all_is_not_this_machine(name):
    assert not is_this_machine(name)
    assert own_address(name) == ""


def parsed(*words: str) -> argparse.Namespace:
    """What the flags of ``launch`` say."""
    parser = argparse.ArgumentParser()
    describe_launch(parser)
    return parser.parse_args(words)


TWO = parse_host_list("198.51.100.1:1,198.51.100.2:1")


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun", "hydra", "slurm"])
def test_the_interface_of_the_user_is_nccls_too(launcher):
    flags = parsed("--slurm", "--launcher", launcher, "--nic", "ib0")
    assert build_job(flags, ["train"], TWO, {}).env["NCCL_SOCKET_IFNAME"] == "ib0"
    assert build_job(flags, ["train"], TWO, {"NCCL_SOCKET_IFNAME": "ib1"}).env["NCCL_SOCKET_IFNAME"] == "ib1"
    assert "NCCL_SOCKET_IFNAME" not in build_job(parsed("--launcher", launcher), ["train"], TWO, {}).env


def test_a_key_is_there_and_found_from_any_folder(tmp_path, monkeypatch):
    """horovodrun is started in another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").touch()
    assert build_job(parsed("--ssh-identity", "key"), ["train"], TWO, {}).ssh.identity == str(tmp_path / "key")
    assert build_job(parsed(), ["train"], TWO, {}).ssh.identity == ""
    for words, why in ((["--ssh-identity", "absent"], "absent: no such file"), (["--ssh-port", "99999"], "--ssh-port 99999: a number up to 65535")):
        with pytest.raises(InputError, match=why):
            build_job(parsed(*words), ["train"], TWO, {})


@pytest.mark.parametrize(("place", "why"), [("", "Is a directory"), ("nowhere/run.sh", "there is no folder"), ("/proc/run.sh", "can't be written")])
def test_a_script_goes_where_a_file_can_be_written(place, why, tmp_path):
    with pytest.raises(InputError, match=why) as caught:
        write_script(tmp_path / place, "#!/bin/sh\n")
    assert str(tmp_path / place) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def in_allocation(monkeypatch, tmp_path):
    """Two nodes, one worker each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x2)")
    return [Host("n1", 1), Host("n2", 1)]


def test_a_container_in_an_allocation_has_its_own_python_and_sees_the_notes(in_allocation, capsys, tmp_path):
    flags = parsed("--slurm", "--container-image", "img", "--dry-run")
    assert launch(flags, ["train"], in_allocation) == 0
    env, argv = (shlex.split(line.removesuffix("\\")) for line in capsys.readouterr().out.splitlines()[-2:])
    notes = dict(word.partition("=")[::2] for word in env)[STATUS_DIR]
    mounts = f"--container-mounts={tmp_path}:{tmp_path},{notes}:{notes}"
    assert argv[-7:-3] == ["--container-image=img", mounts, f"--container-workdir={tmp_path}", "python3"]


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_a_container_goes_with_srun_alone(launcher, in_allocation):
    with pytest.raises(InputError, match=f"go with --launcher slurm: {launcher} on the first node would start workers outside"):
        launch(parsed("--slurm", "--launcher", launcher, "--nic", "lo", "--apptainer", "a.sif", "--dry-run"), ["train"], in_allocation)
