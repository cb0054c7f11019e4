"""Workers that are forked: the project's own command, in a process that was warm already."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from horoyolo.elastic.agent import end_status
from horoyolo.elastic.channel import FD
from horoyolo.elastic.forkserver import Forked, ForkServer, ServerGone, can_fork, serve

TIMEOUT_S = 30


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that waits for the file that it reads, and ends with status 2 when that is nothing of use."""
    fifo = tmp_path_factory.mktemp("fork") / "hosts"
    os.mkfifo(fifo)
    return [sys.executable, "-m", "horoyolo", "launch", "--hostfile", str(fifo), "--dry-run", "--", "train", "--data", "none.yaml"]


@pytest.fixture(scope="module")
def server(argv: list[str]) -> Iterator[ForkServer]:
    server = ForkServer(argv, os.environ, None)
    assert select.select([server.channel], [], [], TIMEOUT_S)[0]
    assert server.hear_warm()
    yield server
    server.close()


def test_an_answer_that_comes_late_is_not_that_of_the_next_request() -> None:
    slow = ForkServer.__new__(ForkServer)
    slow.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with slow.channel, theirs:
        slow.channel.settimeout(0.01)
        assert Forked(1, slow).wait() == -signal.SIGKILL  # it is not known
        with contextlib.suppress(OSError):
            theirs.send(b'{"status": 0}')
        for _ in range(2):
            with pytest.raises(ServerGone):
                slow.ask({"fork": []})


@pytest.fixture
def worker(server: ForkServer) -> Iterator[Forked]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            forked = server.fork({"HOROYOLO_SLOT": "1"}, theirs)
        yield forked
        forked.send_signal(signal.SIGKILL)


def ended(worker: Forked) -> int:
    """The status of a worker, once it has ended."""
    descriptor = os.pidfd_open(worker.pid)
    assert select.select([descriptor], [], [], TIMEOUT_S)[0]
    os.close(descriptor)
    return worker.wait()


def give(argv: list[str], text: str) -> None:
    with Path(argv[argv.index("--hostfile") + 1]).open("w") as fifo:  # blocks until the worker reads
        fifo.write(text)


def test_a_fork_runs_the_command_and_its_status_is_told(argv: list[str], worker: Forked, capfd: pytest.CaptureFixture) -> None:
    give(argv, "nonsense")
    assert ended(worker) == 2


def test_a_fork_looks_like_any_worker(argv: list[str], worker: Forked) -> None:
    with Path(argv[argv.index("--hostfile") + 1]).open("w"):  # so that it has come so far
        assert Path(f"/proc/{worker.pid}/cmdline").read_bytes().decode().split("\0")[:-1] == argv
        assert os.getpgid(worker.pid) == os.getsid(worker.pid) == worker.pid
    assert ended(worker) == 2


def test_a_fork_that_was_killed(worker: Forked) -> None:
    worker.send_signal(signal.SIGKILL)
    assert ended(worker) == -signal.SIGKILL
    worker.send_signal(signal.SIGKILL)  # nobody's number


def test_a_warm_process_can_be_forked(server: ForkServer) -> None:
    """It has one thread, and does not hold a GPU."""
    (pid,) = [int(line.split()[1]) for line in Path(f"/proc/{server._process.pid}/status").read_text().splitlines() if line.startswith("Tgid")]
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    assert not [link for link in Path(f"/proc/{pid}/fd").iterdir() if "nvidia" in os.readlink(link)]


def test_a_server_that_is_gone(argv: list[str], tmp_path: Path) -> None:
    """What its workers noted at their end is known all the same."""
    server = ForkServer(argv, {**os.environ, "PYTHONPATH": "", "HOROYOLO_FORKS_FD": "none"}, None)
    server._process.kill()
    assert select.select([server.channel], [], [], TIMEOUT_S)[0]
    assert not server.hear_warm()
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ServerGone):
        server.fork({FD: "3"}, theirs)
    orphan = Forked(2**22, server)
    assert orphan.wait() == -signal.SIGKILL
    assert end_status(tmp_path, orphan) == -signal.SIGKILL
    (tmp_path / f"status.{os.uname().nodename}.{orphan.pid}").write_text("0")
    assert end_status(tmp_path, orphan) == 0
    assert end_status(tmp_path, orphan) == -signal.SIGKILL  # another one of that number
    server.close()


def test_a_fork_that_there_is_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes on, and whoever asked can try another way."""
    monkeypatch.setattr("horoyolo.elastic.forkserver.os.fork", Mock(side_effect=BlockingIOError))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    serving = threading.Thread(target=serve, args=[theirs])
    serving.start()
    asking = ForkServer.__new__(ForkServer)
    asking.words, asking.channel = [], ours
    with theirs:
        with ours:
            assert asking.hear_warm()
            for _ in range(2):
                assert asking.fork({}, theirs) is None
        serving.join(TIMEOUT_S)
        assert not serving.is_alive()


def test_only_the_project_itself_is_forked() -> None:
    assert can_fork(["python", "-m", "horoyolo", "train"])
    assert not can_fork(["python", "stub_worker.py"])
