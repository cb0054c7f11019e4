"""What Horovod is told before each generation."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from agentend import Agent
from fusion_worker import SIZES

from horoyolo.elastic.channel import FD
from horoyolo.elastic.rendezvous import Rendezvous
from horoyolo.elastic.state import DEFAULT_CYCLE_MS, set_one_of_two

AGAIN_AND_AGAIN = """
import json, os, sys, time
import torch
import horovod.torch as hvd
from horoyolo.elastic.state import set_one_of_two

waits_s = []
for _ in range(3):
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"  # as the launcher gives it to every generation
    set_one_of_two(os.environ, float(sys.argv[1]))
    hvd.init()
    for step in range(6):
        began_s = time.perf_counter()
        hvd.allreduce(torch.ones(1), name="one")
        if step:
            waits_s.append(time.perf_counter() - began_s)
    hvd.shutdown()
print(json.dumps(sorted(waits_s)))
"""


@pytest.mark.parametrize("cycle_time_ms", [DEFAULT_CYCLE_MS, 30.0])
def test_horovod_begins_again_with_the_cycle_that_was_asked_for(cycle_time_ms):
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    env |= {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", AGAIN_AND_AGAIN, str(cycle_time_ms)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    waits_s = json.loads(done.stdout.splitlines()[-1])
    median_ms = waits_s[len(waits_s) // 2] * 1e3
    assert (median_ms > 15) == (cycle_time_ms == 30.0), waits_s


def test_a_cycle_that_the_user_set_goes_before_ours():
    env = {"HOROVOD_CYCLE_TIME": "7", "HOROVOD_FUSION_THRESHOLD": "0"}
    set_one_of_two(env, 10.0)
    assert env == {"HOROVOD_CYCLE_TIME": "7", "HOROVOD_DISABLE_GROUP_FUSION": "1"}
    env = {"HOROVOD_FUSION_THRESHOLD": "0"}
    set_one_of_two(env, DEFAULT_CYCLE_MS)
    assert env == {"HOROVOD_FUSION_THRESHOLD": "0"}


def test_sums_do_not_depend_on_what_else_is_on_its_way_nor_on_who_began_when(tmp_path):
    """Horovod's fusion would add in another order (among three workers), and newcomers and survivors would not agree on what to fuse."""
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    env |= {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "OMP_NUM_THREADS": "1"}
    generations = [Rendezvous("127.0.0.1") for _ in SIZES]
    argv = [sys.executable, str(Path(__file__).with_name("fusion_worker.py")), str(tmp_path)]
    ports = [str(generation.port) for generation in generations]
    workers = [subprocess.Popen([*argv, str(worker), *ports], env=env, stderr=subprocess.PIPE, text=True) for worker in range(max(SIZES))]
    try:
        for worker in workers:
            told = worker.communicate(timeout=60)[1]
            assert worker.returncode == 0, told
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for generation in generations:
            generation.close()
    for worker in range(max(SIZES)):
        for alone, *together in torch.load(tmp_path / f"rank{worker}.pt"):
            assert all(torch.equal(left, right) for sums in together for left, right in zip(alone, sums, strict=True))


BROADCAST_WORKER = Path(__file__).with_name("broadcast_worker.py")
GLOO = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_TIMEOUT_SECONDS": "120"}


@contextlib.contextmanager
def two_workers(what: str) -> Iterator[list[tuple[subprocess.Popen, Agent]]]:
    """Process and channel of a generation of two: rank 0 is about to send something large, or nothing."""
    workers = []
    rendezvous = Rendezvous("127.0.0.1")
    place = {"generation": 1, "size": 2, "local_size": 2, "cross_rank": 0, "cross_size": 1, "stop": False}
    place |= {"addr": "127.0.0.1", "port": rendezvous.port, "iface": "lo"}
    try:
        for _ in range(2):
            ours, theirs = socket.socketpair()
            env = {**os.environ, **GLOO, FD: str(theirs.fileno()), "HOROVOD_HOSTNAME": "localhost", "OMP_NUM_THREADS": "1"}
            argv = [sys.executable, str(BROADCAST_WORKER), what]
            workers.append((subprocess.Popen(argv, env=env, pass_fds=[theirs.fileno()]), Agent(ours)))
            theirs.close()
        for rank, (_, agent) in enumerate(workers):
            agent.hear("ready")
            agent.tell("place", rank=rank, local_rank=rank, **place)
        for _, agent in workers:
            agent.hear("begun")
        yield workers
    finally:
        for process, agent in workers:
            process.kill()
            process.wait()
            agent.channel.close()
        rendezvous.close()


def test_who_waits_for_the_rest_of_a_message_keeps_its_state_and_starts_again():
    """Gloo tells it nothing when the sender dies in the middle, though all connections are ended."""
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    with two_workers("send") as ((sender, _), (receiver, agent)):
        agent.hear("arriving")
        sender.kill()
        began_s = time.monotonic()
        agent.tell("interrupt", generation=1)
        assert "does not end" in agent.hear("kept")["why"]
        assert receiver.wait(10) == -signal.SIGABRT
        assert time.monotonic() - began_s < 5  # about 0.6


def test_who_hears_of_the_end_by_itself_goes_on():
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    with two_workers("idle") as ((sender, _), (receiver, agent)):
        sender.kill()
        agent.tell("interrupt", generation=1)
        assert "does not end" not in agent.hear("kept")["why"]
        assert agent.hear("ready")["generation"] == 1
        assert receiver.wait(10) == 0
