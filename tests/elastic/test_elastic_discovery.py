from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from horoyolo.config import InputError
from horoyolo.elastic.discovery import UP, Discovery, DiscoveryError, Names, ask_hostfile, ask_program, ask_slurm, run, usable, with_slots
from horoyolo.launch.hosts import Host
from horoyolo.launch.remote import this_machine

HERE = "localhost"


def program(folder: Path, text: str, name: str = "hosts.sh") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_program_prints_hosts_and_slots(tmp_path):
    ask = ask_program([program(tmp_path, "echo n1:4; echo '# a comment'; echo n2 slots=2")], None)
    assert ask() == [Host("n1", 4), Host("n2", 2)]


def test_names_get_slots_where_that_is_what_a_program_prints(tmp_path):
    assert ask_program([program(tmp_path, "echo w-0.job; echo w-1.job:1")], 8)() == [Host("w-0.job", 8), Host("w-1.job", 1)]
    assert with_slots("a # first\n\n# none\n b\nc slots=1\nd:3\n", 2).split() == ["a:2", "#", "none", "b:2", "c", "slots=1", "d:3"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("echo error", "'error'"),
        ("exit 3", "status 3"),
        ("echo no API >&2; exit 1", "status 1: no API"),
        ("true", "nothing"),
        ("echo WARN: x y", "WARN"),
        ("echo n1:0", "slots"),
        ("head -c 1000 /dev/zero", "hosts.sh"),
    ],
)
def test_what_is_no_list_is_refused(text, says, tmp_path):
    with pytest.raises((DiscoveryError, InputError), match=says):
        ask_program([program(tmp_path, text)], None)()


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path):
    begin_s = time.monotonic()
    with pytest.raises(DiscoveryError, match="no answer"):
        run([program(tmp_path, f"sleep 50 & echo $! > {tmp_path}/pid; sleep 60; echo n1:1")], limit_s=2)
    assert time.monotonic() - begin_s < 30
    child = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    while child.exists() and " Z " not in child.read_text():
        assert time.monotonic() - begin_s < 30
        time.sleep(0.05)


def test_slurm_is_the_allocation_and_the_nodes_that_are_up(tmp_path, monkeypatch):
    states = "n1 allocated\nn2 down*\nn3 mixed\nn3 mixed\nn4 idle*\nn9 idle"
    program(tmp_path, f"case $* in *--all*) printf '{states}';; esac", "sinfo")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    ask = ask_slurm({"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_TASKS_PER_NODE": "2(x4)"})
    assert ask() == [Host("n1", 2), Host("n3", 2)]


@pytest.mark.parametrize(
    ("state", "is_up"),
    [
        *((state, True) for state in ("allocated+", "mixed-", "draining@", "allocated$", "maint", "planned", "idle#", "mixed^", "allocated!")),
        *((state, False) for state in ("down", "drained", "idle~", "mixed%", "allocated*", "mixed-*", "unknown", "failing", "")),
    ],
)
def test_a_node_of_slurm_is_up_while_it_keeps_its_jobs(state, is_up):
    assert bool(UP.fullmatch(state)) == is_up


def test_slurm_without_any_node_that_is_up_is_no_answer(tmp_path, monkeypatch):
    program(tmp_path, "echo n1 down", "sinfo")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(DiscoveryError, match="no node"):
        ask_slurm({"SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "2"})()


def test_unknown_names_are_left_out_and_this_machine_is_one_host():
    here = this_machine()

    def known(*hosts):
        names = Names()
        names.learn(host.name for host in hosts)
        return usable(hosts, names)

    assert known(Host("localhost", 2), Host("127.0.0.1", 1)) == [Host(here, 3)]
    assert known(Host("no.such.name.invalid", 2), Host("127.0.0.1", 1)) == [Host(here, 1)]
    assert known(Host("198.51.100.1", 2), Host("::1", 1), Host(here, 1)) == [Host("198.51.100.1", 2), Host(here, 2)]
    with pytest.raises(DiscoveryError, match="no host with a known IPv4 address"):
        known(Host("no.such.name.invalid", 2))
    with pytest.raises(DiscoveryError, match="no host with a known IPv4 address"):
        known(Host("2001:db8::7", 2))  # workers look each other up by IPv4 alone


@pytest.mark.parametrize("name", ["a..b", "a" * 64])
def test_what_is_no_name_at_all_is_unknown(name):
    names = Names()
    names.learn([name])
    assert names.address(name) == ""


class NameServer:
    """In the place of ``socket.getaddrinfo``: what it knows, and who was asked for."""

    def __init__(self, **known):
        self.known, self.asked = known, []

    def __call__(self, name, *arguments, **more):
        self.asked.append(name)
        if name not in self.known:
            raise socket.gaierror(socket.EAI_AGAIN, "a bad moment")
        return [(socket.AF_INET6, 2, 17, "", ("2001:db8::9", 0, 0, 0)), (socket.AF_INET, 2, 17, "", (self.known[name], 0))]


def test_no_host_leaves_because_name_servers_have_a_bad_moment(monkeypatch):
    told: list[str] = []
    one, both = [Host("n1", 2)], [Host("n1", 2), Host("n2", 2)]
    server = NameServer(n1="198.51.100.1", n2="198.51.100.2")
    monkeypatch.setattr("horoyolo.elastic.discovery.socket.getaddrinfo", server)
    monkeypatch.setattr("horoyolo.elastic.discovery.is_this_machine", lambda address: False)
    discovery = Discovery(Answers(both, both, both, one, one, one, both, both, both, both), 1, told.append)
    discovery.ask_once()
    assert discovery.hosts() == both
    assert discovery.address("n2") == "198.51.100.2"
    server.known.clear()
    for _ in range(2):
        discovery.ask_once()
    assert discovery.hosts() == both
    assert sorted(server.asked) == ["n1", "n2"]
    for _ in range(3):
        discovery.ask_once()
    assert discovery.hosts() == one
    discovery.ask_once()  # it has left the list, and is looked up anew
    assert discovery.hosts() == one
    assert told == ["hosts: n2 left out: no IPv4 address of such a name is known here"]
    server.known["n2"] = "198.51.100.3"
    for _ in range(3):
        discovery.ask_once()
    assert discovery.hosts() == both
    assert discovery.address("n2") == "198.51.100.3"
    assert len(told) == 1


class Answers:
    """A source that gives one answer after the other, the last one for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_last_good_list_holds_and_a_new_one_must_come_twice():
    told: list[str] = []
    two, three = [Host(HERE, 2)], [Host(HERE, 3)]
    trouble = DiscoveryError("no answer")
    discovery = Discovery(Answers(two, three, two, three, trouble, trouble, three, three), 1, told.append)
    seen = []
    for _ in range(8):
        discovery.ask_once()
        seen.append(discovery.hosts()[0].slots)
    assert seen == [2, 2, 2, 2, 2, 2, 3, 3]
    assert told == ["hosts: no answer; 1 hosts as before", "hosts: the list can be read again"]


def test_an_edited_hostfile_is_seen_by_the_thread(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("localhost slots=1\n")
    discovery = Discovery(ask_hostfile(str(path), None), 0.02, lambda line: None)
    discovery.start()
    for slots in (1, 4, 2):
        path.write_text(f"localhost slots={slots}\n")
        end_s = time.monotonic() + 5
        while [host.slots for host in discovery.hosts()] != [slots]:
            assert time.monotonic() < end_s
            time.sleep(0.01)
    path.unlink()
    time.sleep(0.1)
    assert [host.slots for host in discovery.hosts()] == [2]
    discovery.close()


def test_a_source_that_hangs_holds_nobody_up(tmp_path):
    discovery = Discovery(ask_program([program(tmp_path, "sleep 5; echo localhost:1")], None), 1, lambda line: None)
    begin_s = time.monotonic()
    discovery.start()
    assert discovery.hosts() == []
    discovery.close()
    assert time.monotonic() - begin_s < 1
