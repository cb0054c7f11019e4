"""What an elastic job runs on each host: it starts that host's workers, tells the launcher at once when one ends, and outlives them all.

``python -m horoyolo.elastic.agent FOLDER`` talks in messages (``channel.py``) over its own input and output, which ssh carries: no port is
open, no secret is needed, and no variable of the job stands on a command line. It is told ``{"do": ...}``: ``serve`` (argv, cwd and env of all
workers), ``start`` (worker, slot, env), ``tell`` (worker, message), ``signal`` (worker, number), ``alive``, ``end``; it says ``{"is": ...}``:
``ready``, ``said`` (worker, message), ``ended`` (worker, status), ``alive``.

Workers are forked from a process that is warm (``forkserver.py``), once it is; where there is none they are children of the agent. Each has a
socket for its messages. The agent leaves no orphan: after ``end``, when its input ends (the launcher or its ssh died) or when nothing came for
LEASE_S (the network is gone), it kills every process of the job on this host. Such a process has FOLDER, the job's tag, in its environment.
What an earlier agent of the same job left here is killed at the start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from horoyolo.elastic.channel import ALIVE_EVERY_S, FD, LEASE_S, MEMORY, SLOT, Lines, Message, encode
from horoyolo.elastic.forkserver import Forked, ForkServer, ServerGone, can_fork
from horoyolo.launch.agent import kill_job
from horoyolo.launch.status import STATUS_DIR, make_folder, remove_notes, take_status
from horoyolo.signals import REQUESTS

SHARED_MEMORY = Path("/dev/shm")
MEMORY_SUFFIX = "-memory"
MEMORY_TRIES = 100
POLL_S = 1.0


@dataclass
class _Worker:
    name: str
    process: subprocess.Popen | Forked
    channel: socket.socket
    ended: int  # pidfd: readable when the process has ended
    lines: Lines = field(default_factory=Lines)


class Agent:
    """The agent of one host and one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = (SHARED_MEMORY if SHARED_MEMORY.is_dir() else folder.parent) / f"{folder.name}{MEMORY_SUFFIX}"
        self._workers: dict[str, _Worker] = {}
        self._job: Message = {}
        self._told = Lines()
        self._forks: ForkServer | None = None
        self._forks_warm = False
        self._to_start: dict[str, Message] = {}  # worker -> what was said of it, until the server is warm
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ, self._hear_launcher)

    def serve(self) -> None:
        """Do what the launcher says until it says ``end`` or is gone."""
        self._heard_s = time.monotonic()
        alive_s = 0.0
        self._wanted = True
        while self._wanted and time.monotonic() - self._heard_s < LEASE_S:
            if time.monotonic() - alive_s > ALIVE_EVERY_S:
                alive_s = time.monotonic()
                say({"is": "alive"})
                for worker in self._workers.values():
                    tell(worker, {"tell": "alive"})
            for key, _ in self._selector.select(POLL_S):
                if key.fileobj in self._selector.get_map():  # not yet done with in this round
                    key.data()

    # -- what is heard

    def _hear_launcher(self) -> None:
        part = os.read(0, 2**16)
        if not part:
            self._wanted = False
            return
        self._heard_s = time.monotonic()
        for message in self._told.feed(part):
            self._obey(message)

    def _obey(self, message: Message) -> None:
        worker = self._workers.get(message.get("worker", ""))
        match message["do"]:
            case "serve":
                self._job = message
                self._warm_up()
            case "start" if self._forks and not self._forks_warm:
                self._to_start[message["worker"]] = message
            case "start":
                self._start(message["worker"], message["slot"], message["env"])
            case "signal" if self._to_start.pop(message["worker"], None):
                say({"is": "ended", "worker": message["worker"], "status": -message["number"]})
            case "tell" if worker:
                tell(worker, message["message"])
            case "signal" if worker:
                worker.process.send_signal(message["number"])
            case "end":
                self._wanted = False

    def _hear_worker(self, worker: _Worker) -> None:
        """Pass on what a worker says, as far as it has come."""
        with contextlib.suppress(BlockingIOError):
            while worker.channel in self._selector.get_map():
                try:
                    part = worker.channel.recv(2**16)
                    messages = worker.lines.feed(part)
                except (ConnectionError, ValueError):  # it has ended with our words unread, or talks nonsense
                    part, messages = b"", []
                for message in messages:
                    say({"is": "said", "worker": worker.name, "message": message})
                if not part:
                    self._selector.unregister(worker.channel)  # its end follows

    def _see_end(self, worker: _Worker) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)  # its loader processes; its number is not free before it is waited for
        self._hear_worker(worker)
        for source in (worker.channel, worker.ended):
            if source in self._selector.get_map():  # a child of its own may still hold the channel's other end
                self._selector.unregister(source)
        worker.channel.close()
        os.close(worker.ended)
        del self._workers[worker.name]
        say({"is": "ended", "worker": worker.name, "status": end_status(self.folder, worker.process)})

    # -- workers

    def _warm_up(self) -> None:
        """Starts what workers are forked from. Without it they start by themselves."""
        if not can_fork(self._job["argv"]):
            return
        try:
            self._forks = ForkServer(self._job["argv"], {**self._env(), STATUS_DIR: str(self.folder)}, self._job["cwd"] or None)
        except OSError:  # neither can workers be: they say why
            return
        self._selector.register(self._forks.channel, selectors.EVENT_READ, self._hear_forks)

    def _hear_forks(self) -> None:
        """The server is warm, or has ended: a worker that it can't fork starts by itself."""
        assert self._forks
        self._forks_warm = self._forks.hear_warm()
        if not self._forks_warm:
            self._lose_forks()
        waiting, self._to_start = self._to_start, {}
        for message in waiting.values():
            self._start(message["worker"], message["slot"], message["env"])

    def _lose_forks(self) -> None:
        assert self._forks
        self._selector.unregister(self._forks.channel)
        self._forks.close()
        self._forks = None

    def _env(self) -> dict[str, str]:
        """The variables that all workers have."""
        return {**os.environ, **self._job["env"]}

    def _start(self, name: str, slot: int, env: dict[str, str]) -> None:
        memory = self.memory / f"slot-{slot}"
        memory.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        own = {**env, SLOT: str(slot), MEMORY: str(memory), STATUS_DIR: str(self.folder)}
        try:
            process = self._forked(own, theirs) or self._begun(own, theirs)
        except OSError as error:
            ours.close()
            print(f"horoyolo: {self._job['argv'][0]} can't be started: {error.strerror}", file=sys.stderr, flush=True)
            say({"is": "ended", "worker": name, "status": 1})
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        worker = _Worker(name, process, ours, os.pidfd_open(process.pid))
        self._workers[name] = worker
        self._selector.register(ours, selectors.EVENT_READ, partial(self._hear_worker, worker))
        self._selector.register(worker.ended, selectors.EVENT_READ, partial(self._see_end, worker))

    def _forked(self, env: dict[str, str], channel: socket.socket) -> Forked | None:
        if self._forks is not None:
            try:
                return self._forks.fork(env, channel)
            except ServerGone:
                self._lose_forks()
        return None

    def _begun(self, env: dict[str, str], channel: socket.socket) -> subprocess.Popen:
        return subprocess.Popen(
            self._job["argv"],
            env={**self._env(), **env, FD: str(channel.fileno())},
            cwd=self._job["cwd"] or None,
            pass_fds=[channel.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # standard output is for messages
            start_new_session=True,
        )


def say(message: Message) -> None:
    """Tell the launcher something; one that is gone is noticed where its words are read."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, encode(message))


def tell(worker: _Worker, message: Message) -> None:
    """Tell a worker something. One that has ended, or has not read for so long that no more fits, is left alone: its end is seen elsewhere."""
    with contextlib.suppress(OSError):
        worker.channel.send(encode(message))


def end_status(folder: Path, process: subprocess.Popen | Forked) -> int:
    """How a worker that has ended did so: what it noted (``launch/status.py``), else the exit status, negative for a signal.

    Its note is the last that it does, and all that is known where the server that it was forked from is gone.
    """
    status = process.wait()
    noted = take_status(folder, process.pid)
    return status if noted is None else noted


@contextlib.contextmanager
def kept_memory(memory: Path) -> Iterator[None]:
    """A folder that is this agent's while the block runs, and is gone afterwards.

    It is locked. So those whose agent was killed, with the launcher, can be told from the others, and are removed too: memory is scarce.
    """
    for stale in memory.parent.glob(f"horoyolo-job-*{MEMORY_SUFFIX}"):
        if stale != memory and _is_own(stale) and (lock := _lock(stale)) is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)
    for _ in range(MEMORY_TRIES):
        memory.mkdir(mode=0o700, exist_ok=True)
        lock = _lock(memory)
        if lock is not None:
            break
        time.sleep(0.01)  # another agent has just found the new folder without a lock, and removes it
    try:
        yield
    finally:
        shutil.rmtree(memory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _is_own(folder: Path) -> bool:
    """Whether a folder is this user's; not, where its agent has just removed it."""
    try:
        return folder.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a folder's lock; None when somebody else does, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not os.fstat(descriptor).st_nlink:  # it was removed before it was locked
        os.close(descriptor)
        return None
    return descriptor


def main(folder: Path) -> None:
    """Serve one job on this host from its beginning to its end."""
    for number in REQUESTS:
        signal.signal(number, lambda *_: None)  # the launcher decides when the job ends; unlike SIG_IGN, workers don't inherit this
    kill_job(folder)
    make_folder(folder)
    agent = Agent(folder)
    with kept_memory(agent.memory):
        try:
            say({"is": "ready"})
            agent.serve()
        finally:
            kill_job(folder)
            remove_notes(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
