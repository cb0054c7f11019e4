"""What the flags of ``launch`` become."""

from __future__ import annotations

import os

import pytest

from horoyolo.launch.hosts import Host, parse_host_list
from horoyolo.launch.interface import own_address
from horoyolo.launch.remote import is_this_machine
from horoyolo.launch.start import with_one_name_here

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
