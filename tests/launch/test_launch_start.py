"""What the flags of ``launch`` become."""

from __future__ import annotations

import argparse
import os

import pytest

from horoyolo.config import InputError
from horoyolo.launch.flags import describe_launch
from horoyolo.launch.hosts import Host, parse_host_list
from horoyolo.launch.interface import own_address
from horoyolo.launch.remote import is_this_machine
from horoyolo.launch.start import build_job, with_one_name_here, write_script

HERE = os.uname().nodename


@pytest.mark.parametrize(
    ("hosts", "meant"),
    [
        ("192.0.2.1:2,127.0.0.2:1", [Host("192.0.2.1", 2), Host(HERE, 1)]),
        (f"127.0.0.2:1,192.0.2.1:2,{HERE}:3", [Host(HERE, 4), Host("192.0.2.1", 2)]),
        ("localhost:1,192.0.2.1:2", [Host(HERE, 1), Host("192.0.2.1", 2)]),
        ("127.0.0.2:1,localhost:2", [Host("localhost", 3)]),
        ("192.0.2.1:2,203.0.113.1:2", [Host("192.0.2.1", 2), Host("203.0.113.1", 2)]),
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


TWO = parse_host_list("192.0.2.1:1,192.0.2.2:1")


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun", "hydra", "slurm"])
def test_the_interface_of_the_user_is_nccls_too(launcher):
    flags = parsed("--slurm", "--launcher", launcher, "--nic", "ib0")
    assert build_job(flags, ["train"], TWO, {}).env["NCCL_SOCKET_IFNAME"] == "ib0"
    assert build_job(flags, ["train"], TWO, {"NCCL_SOCKET_IFNAME": "ib1"}).env["NCCL_SOCKET_IFNAME"] == "ib1"
    assert "NCCL_SOCKET_IFNAME" not in build_job(parsed("--launcher", launcher), ["train"], TWO, {}).env


@pytest.mark.parametrize(
    ("place", "why"), [("", "Is a directory"), ("nowhere/run.sh", "there is no folder"), ("/proc/run.sh", "can't be written")]
)
def test_a_script_goes_where_a_file_can_be_written(place, why, tmp_path):
    with pytest.raises(InputError, match=why) as caught:
        write_script(tmp_path / place, "#!/bin/sh\n")
    assert str(tmp_path / place) in str(caught.value)
    assert not list(tmp_path.iterdir())
