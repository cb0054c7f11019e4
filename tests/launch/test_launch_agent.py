"""What the agent of a host says to its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from horoyolo.launch.agent import END, READY, SIGNAL, SIGNALLED, WORKER
from horoyolo.launch.status import STATUS_DIR

WAITS = [sys.executable, "-c", "from horoyolo.launch.status import announce_worker; input(); announce_worker(); input()"]


def test_workers_are_told_of_before_a_signal_is_answered(tmp_path: Path) -> None:
    """A launcher that finds no worker then may end the job: nothing would be saved."""
    folder = tmp_path / "notes"
    argv = [sys.executable, "-m", "horoyolo.launch.agent", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, STATUS_DIR: str(folder)}
    with subprocess.Popen(argv, **pipes) as agent, subprocess.Popen(WAITS, env=env, **pipes) as worker:
        assert agent.stdout.readline().strip() == READY
        os.kill(agent.pid, signal.SIGSTOP)  # it sees the note and the signal together
        worker.stdin.write("\n")
        worker.stdin.flush()
        while not list(folder.glob("worker.*")):
            assert worker.poll() is None
        agent.stdin.write(f"{SIGNAL} {signal.SIGTERM}\n")
        agent.stdin.flush()
        os.kill(agent.pid, signal.SIGCONT)
        told = [agent.stdout.readline().strip() for _ in range(2)]
        agent.stdin.write(f"{END}\n")
        agent.stdin.flush()
        assert told == [f"{WORKER} {worker.pid}", SIGNALLED]
        assert worker.wait(20) == -signal.SIGTERM
        assert agent.wait(20) == 0


def test_agents_of_two_hosts_may_see_one_folder(tmp_path: Path) -> None:
    """TMPDIR on a file system of the cluster, and not yet there on the second: the first that ends leaves the other its notes."""
    folder = tmp_path / "tmp" / "notes"
    argv = [sys.executable, "-m", "horoyolo.launch.agent", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipes) as agent:
        assert agent.stdout.readline().strip() == READY
        (folder / "agent.n2.7").touch()
        (folder / "status.n2.8").write_text("0")
        agent.stdin.write(f"{END}\n")
        agent.stdin.flush()
        assert agent.wait(20) == 0
    assert {path.name for path in folder.iterdir()} == {"agent.n2.7", "status.n2.8"}
