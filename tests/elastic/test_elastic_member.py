"""A worker's end of its channel, with a test at the other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from agentend import Agent

from horoyolo.config import Config, InputError
from horoyolo.elastic.channel import FD, HANG_TIMEOUT
from horoyolo.elastic.member import Member, end_sockets, open_member, tcp_sockets
from horoyolo.engine.start import start_member

PLACE = {"rank": 1, "size": 2, "local_rank": 0, "local_size": 1, "cross_rank": 1, "cross_size": 2, "addr": "127.0.0.1", "port": 1, "stop": False}


@pytest.fixture(scope="module", autouse=True)
def _never_end() -> None:
    """Threads of a member outlive their test: in this process they may end themselves alone, also long afterwards."""
    pytest.MonkeyPatch().setattr("horoyolo.elastic.member.end", sys.exit)


@pytest.fixture
def ends() -> tuple[Member, Agent]:
    ours, theirs = socket.socketpair()
    agent = Agent(ours)
    # To the end of the tests: a member's threads live as long as its process, which they would end when the agent is gone or silent.
    threading.Thread(target=agent.keep_alive, daemon=True).start()
    return Member(theirs), agent


def connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


def test_signs_of_life_say_what_the_main_thread_does(ends: tuple[Member, Agent]) -> None:
    member, agent = ends
    assert agent.hear("pulse")["phase"] == "start"
    member.step = 7
    member.enter("step")
    with member.phase("wait"):
        pulse = agent.hear("pulse")
        assert (pulse["phase"], pulse["step"], pulse["limit_s"]) == ("wait", 7, None)
    pulse = agent.hear("pulse")
    assert pulse["phase"] == "step"
    assert pulse["age_s"] < 1.5
    assert pulse["limit_s"] == 15


def test_a_step_may_take_what_the_job_says_or_ten_times_the_longest_or_twice_the_first() -> None:
    ours, theirs = socket.socketpair()
    member, agent = Member(theirs, hang_timeout_s=0.5), Agent(ours)
    threading.Thread(target=agent.keep_alive, daemon=True).start()
    member.begin_step("train")
    assert agent.hear("pulse")["phase"] == "start"
    pulse = agent.hear("pulse")
    assert (pulse["phase"], pulse["limit_s"]) == ("first", 600)
    member.begin_step("train")
    pulse = agent.hear("pulse")
    assert pulse["phase"] == "step"
    assert 1.6 < pulse["limit_s"] < 20  # the first took about a second
    member.begin_step("train")
    assert 8 < agent.hear("pulse")["limit_s"] < 100  # so did the second
    phases = []
    for _ in member.steps(range(2), "evaluate"):
        phases.append(member.enter("other"))
        member.enter(phases[-1])
    assert phases == ["first", "step"]
    assert member.enter("other") == "other"


def test_a_step_may_take_the_hang_timeout_that_launch_was_given() -> None:
    ours, theirs = socket.socketpair()
    agent = Agent(ours)
    threading.Thread(target=agent.keep_alive, daemon=True).start()
    member = open_member({FD: str(theirs.detach()), HANG_TIMEOUT: "40.0"})
    member.enter("step")
    while (pulse := agent.hear("pulse"))["phase"] != "step":
        pass
    assert pulse["limit_s"] == 40


def test_a_place_is_what_horovod_reads_and_a_change_is_of_its_generation(ends: tuple[Member, Agent]) -> None:
    member, agent = ends
    member.ready()
    assert agent.hear("ready")["generation"] == 0
    agent.tell("place", generation=3, **PLACE)
    place = member.wait_place()
    assert (place.generation, place.size, place.stop) == (3, 2, False)
    assert place.env["HOROVOD_RANK"] == "1"
    assert place.env["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "1"
    agent.tell("change", generation=2, leaving=True)
    agent.tell("change", generation=3, leaving=True)
    member.wait_change()
    assert member.change_wanted
    assert member.leaving


def test_an_interrupt_ends_the_connections_of_its_generation_and_no_others(ends: tuple[Member, Agent]) -> None:
    member, agent = ends
    before = connection()
    agent.tell("place", generation=1, **PLACE)
    member.wait_place()
    with member.joining():
        ours, theirs = connection()
    assert agent.hear("joined")["generation"] == 1
    agent.tell("interrupt", generation=0)
    agent.tell("interrupt", generation=1)
    theirs.settimeout(10)
    assert theirs.recv(1) == b""
    ours.settimeout(10)
    assert ours.recv(1) == b""
    before[0].sendall(b"x")
    assert before[1].recv(1) == b"x"
    for each in (ours, theirs, *before):
        each.close()


def test_sockets_are_known_by_what_they_are_not_by_their_number() -> None:
    one, other = connection()
    inode = os.fstat(one.fileno()).st_ino
    assert tcp_sockets()[inode] == one.fileno()
    one.close()
    again, peer = connection()  # may have the same number
    assert end_sockets({inode}) == 0
    assert end_sockets({os.fstat(again.fileno()).st_ino}) == 1
    for each in (other, again, peer):
        each.close()


@pytest.mark.parametrize(("words", "status"), [("close", 1), ("interrupt", -6)])
def test_a_worker_ends_when_its_agent_is_gone_and_when_what_it_joins_is_broken(words: str, status: int) -> None:
    program = """
        import socket, time
        from horoyolo.elastic.member import Member
        member = Member(socket.socket(fileno=%d))
        member.ready()
        member.wait_place()
        with member.joining():
            member.say("here")
            time.sleep(30)
    """
    ours, theirs = socket.socketpair()
    text = textwrap.dedent(program) % theirs.fileno()
    process = subprocess.Popen([sys.executable, "-c", text], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
    theirs.close()
    agent = Agent(ours)
    agent.hear("ready")
    agent.tell("place", generation=1, **PLACE)
    agent.hear("here")
    if words == "interrupt":
        agent.tell("interrupt", generation=1)
    else:
        ours.close()
    started_s = time.monotonic()
    assert process.wait(10) == status
    assert time.monotonic() - started_s < 5
    assert process.stderr is not None
    assert "horoyolo:" in process.stderr.read()


def test_without_a_channel_it_says_how_to_start() -> None:
    with pytest.raises(InputError, match="horoyolo launch --min-np"):
        open_member({})


def test_a_host_that_sends_others_to_themselves_is_told_before_it_asks_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_CROSS_SIZE", "2")
    monkeypatch.setattr("socket.gethostname", lambda: "127.0.1.1")
    with pytest.raises(InputError, match=r"127\.0\.1\.1"):
        start_member(Config(), None, None, None, on_ready=None)  # type: ignore[arg-type]  # it looks at nothing else before


def test_messages_of_several_threads_do_not_mix(ends: tuple[Member, Agent]) -> None:
    member, agent = ends
    threads = [threading.Thread(target=lambda: [member.say("x", text="y" * 2000) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert all(len(agent.hear("x")["text"]) == 2000 for _ in range(80))
