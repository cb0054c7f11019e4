"""A worker's side of an elastic job: its channel to the agent of its host (``channel.py`` has the words).

Two threads of their own keep the channel: one gives a sign of life every second and says what the main thread is doing, the other listens. Where
the agent is gone or silent the process ends; where the generation is broken it ends the connections of the generation, since a collective that
waits for a dead worker on a healthy connection to a living one would wait for Gloo's time limit.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from horoyolo.config import InputError
from horoyolo.elastic.channel import FD, HANG_TIMEOUT, HANG_TIMEOUT_S, LEASE_S, MEMORY, SLOT, SLOTS, Lines, Message, encode

PULSE_EVERY_S = 1.0
# A step may take --hang-timeout, or so many times the longest one so far, or so many times the longest of those that were the first of their kind:
# these are slow for reasons of their own.
STEP_TIMES, FIRST_TIMES = 10, 2
OTHER_LIMIT_S = 600.0  # imports, the first batch of an epoch, the first step of a kind; scores, checkpoints, plots
STUCK_S = 0.5  # after the connections of a broken generation were ended, for whoever waits in it to notice
LIMITS_S: dict[str, float | None] = {"start": OTHER_LIMIT_S, "first": OTHER_LIMIT_S, "other": OTHER_LIMIT_S, "wait": None, "idle": None}

OUT, JOINING, UP = "out", "joining", "up"

Batch = TypeVar("Batch")


class Fixed:
    """What a worker of an ordinary job has instead of a ``Member``: its workers never change, and nobody watches it."""

    step = 0
    change_wanted = False
    memory: Path | None = None

    def phase(self, name: str) -> AbstractContextManager:
        """Nothing to note."""
        return nullcontext()

    def enter(self, name: str) -> None:
        """Nothing to note."""

    def begin_step(self, kind: str) -> None:
        """Nothing to note."""

    def steps(self, batches: Iterable[Batch], kind: str) -> Iterable[Batch]:
        """The same batches."""
        return batches


@dataclass(frozen=True)
class KnownRun:
    """What the launcher knows of the run that its workers have opened: should all of them be gone, the next ones go on with that."""

    folder: Path
    step: int  # the last one that was completed, as far as the launcher has heard


@dataclass(frozen=True)
class Place:
    """A worker's place in a generation."""

    generation: int
    size: int
    env: dict[str, str]  # what Horovod reads
    stop: bool  # only to leave a checkpoint together
    run: KnownRun | None = None  # None: nobody has opened one yet


class Member:
    """The channel of this worker. ``step`` is what it is at, for the signs of life."""

    def __init__(
        self, channel: socket.socket, slot: int = 0, slots: int = 1, memory: Path | None = None, hang_timeout_s: float = HANG_TIMEOUT_S
    ) -> None:
        """``slot`` of ``slots`` of this host is this worker's; ``memory`` outlives it. A step may take ``hang_timeout_s`` at least."""
        self.slot, self.slots, self.memory = slot, slots, memory
        self.step = 0
        self.generation = 0  # the last one that it had a place in
        self._channel = channel
        self._phase = ("start", time.monotonic())
        self._hang_timeout_s = hang_timeout_s
        self._longest_s = {"first": 0.0, "step": 0.0}
        self._kinds: set[str] = set()  # of steps that were begun
        self._state = OUT
        self._sockets: set[int] = set()  # of the generation, by inode
        self._change: Message = {}
        self._interrupted = 0  # the last generation that was
        self._ended_s = float("inf")  # when the connections of the present generation were ended
        self._places: list[Message] = []
        self._news = threading.Condition()
        self._sending = threading.Lock()
        self._main = threading.main_thread().ident
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # some ends by abort are ordinary here
        for target in (self._pulse, self._listen):
            threading.Thread(target=target, daemon=True).start()

    # -- what the main thread is doing

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The main thread is in phase start, first, step, wait, other or idle while the block runs. Other threads' calls don't count."""
        if threading.get_ident() != self._main:
            yield
            return
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> str:
        """The main thread is in another phase from now on, or in the same anew; gives the one before."""
        (last, since_s), now_s = self._phase, time.monotonic()
        if last in self._longest_s:
            self._longest_s[last] = max(self._longest_s[last], now_s - since_s)
        self._phase = (name, now_s)
        return last

    def begin_step(self, kind: str) -> None:
        """The main thread has a batch in hand. The first step of its kind has more time: memory is taken then, and kernels are chosen."""
        self.enter("step" if kind in self._kinds else "first")
        self._kinds.add(kind)

    def steps(self, batches: Iterable[Batch], kind: str) -> Iterator[Batch]:
        """The batches of a loop without collectives, each a step; behind it the main thread is in phase other."""
        for batch in batches:
            self.begin_step(kind)
            yield batch
            self.enter("step")  # the next batch is waited for
        self.enter("other")

    # -- generations

    def ready(self) -> None:
        """Says that this worker wants a place in the next generation, having left the last one."""
        self.say("ready", generation=self.generation)

    def wait_place(self) -> Place:
        """The place that this worker is given; waits for it as long as it takes."""
        with self.phase("idle"), self._news:
            self._news.wait_for(lambda: self._places and self._places[-1]["generation"] > self.generation)
            told = self._places[-1]
            self._places.clear()
            self._change = {}
            self.generation = told["generation"]
        numbers = {name: told[name] for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")}
        where = {"gloo_rendezvous_addr": told["addr"], "gloo_rendezvous_port": told["port"]}
        if told.get("iface"):
            where["gloo_iface"] = told["iface"]
        env = {f"HOROVOD_{name.upper()}": str(value) for name, value in (numbers | where).items()}
        run = KnownRun(Path(told["folder"]), told["step"]) if told.get("folder") else None
        return Place(self.generation, told["size"], env, bool(told.get("stop")), run)

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        """The generation's connections are opened while the block runs. Where it breaks meanwhile, the process aborts: there is no way out."""
        before = tcp_sockets()
        with self._news:
            self._state = JOINING
        yield
        with self._news:
            self._sockets = set(tcp_sockets()) - set(before)
            self._state, self._ended_s = UP, float("inf")
        self.say("joined", generation=self.generation)

    def broken(self) -> None:
        """A collective failed here: ends the generation's connections, so that others notice too, and says so."""
        with self._news:
            if self._state == UP:
                self._end_sockets()
        self.say("broken", generation=self.generation)

    def is_stuck(self) -> bool:
        """Whether a collective under way has not noticed that its connections are ended, and never will.

        Gloo 0.5 (tcp/pair.cc, ``signalException``) tells those who wait for a message that has not begun, or for one to be asked for, but nobody
        who waits for the rest of a message or has one half sent: they wait for Gloo's time limit.
        """
        return time.monotonic() - self._ended_s > STUCK_S

    @contextlib.contextmanager
    def leaving_generation(self) -> Iterator[None]:
        """Communication is closed while the block runs. Where a collective of a broken generation never ends, the process aborts."""
        broken = self._ended_s < float("inf")
        limit = threading.Timer(0.0 if self.is_stuck() else STUCK_S, start_again, ["a collective never ends"])
        limit.daemon = True
        if broken:
            limit.start()
        with self.phase("wait"):
            yield
        limit.cancel()

    def wait_change(self) -> None:
        """Returns when this worker was told of the change that others have heard of, or of the generation's end."""
        with self.phase("wait"), self._news:
            self._news.wait_for(lambda: self.change_wanted or self._interrupted == self.generation, LEASE_S)

    def left(self) -> None:
        """The generation's connections are closed."""
        with self._news:
            self._state, self._sockets = OUT, set()

    @property
    def change_wanted(self) -> bool:
        """Whether the present generation is to end after the next update."""
        return self._change.get("generation") == self.generation

    @property
    def leaving(self) -> bool:
        """Whether this worker is to leave for good then."""
        return self.change_wanted and bool(self._change.get("leaving"))

    # -- the channel

    def say(self, what: str, **more: Any) -> None:
        """Tells the launcher something. An agent that is gone is noticed by the listener."""
        with self._sending, contextlib.suppress(OSError):
            self._channel.sendall(encode({"say": what, **more}))

    def _pulse(self) -> None:
        while True:
            phase, since_s = self._phase
            step_limit_s = max(self._hang_timeout_s, STEP_TIMES * self._longest_s["step"], FIRST_TIMES * self._longest_s["first"])
            limit_s = step_limit_s if phase == "step" else LIMITS_S[phase]
            self.say("pulse", step=self.step, phase=phase, age_s=round(time.monotonic() - since_s, 3), limit_s=limit_s)
            time.sleep(PULSE_EVERY_S)

    def _listen(self) -> None:
        lines, heard_s = Lines(), time.monotonic()
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            if not poll.poll(1000):
                # Looked at once more: a process that was stopped for a while finds its words, and its lease over.
                if time.monotonic() - heard_s > LEASE_S and not poll.poll(0):
                    end("the launcher's agent on this host is silent")
                continue
            try:
                part = self._channel.recv(2**16)
            except OSError:
                part = b""
            if not part:
                end("the launcher's agent on this host is gone")
            heard_s = time.monotonic()
            for message in lines.feed(part):
                self._hear(message)

    def _hear(self, message: Message) -> None:
        told = message.get("tell")
        with self._news:
            if told == "place":
                self._places.append(message)
                self._news.notify_all()
            elif told == "change":
                self._change = message
                self._news.notify_all()
            elif told == "interrupt" and message["generation"] == self.generation:
                self._interrupted = self.generation
                self._news.notify_all()
                if self._state == JOINING:
                    start_again(f"generation {self.generation} broke while it was formed")
                elif self._state == UP:
                    self._end_sockets()

    def _end_sockets(self) -> None:
        end_sockets(self._sockets)
        self._ended_s = min(self._ended_s, time.monotonic())


def open_member(env: Mapping[str, str]) -> Member:
    """The channel that the agent left this process (InputError: there is none)."""
    if FD not in env:
        raise InputError("train --elastic is one worker of an elastic job: start it as `horoyolo launch --min-np N -- train ...`")
    memory = Path(env[MEMORY]) if MEMORY in env else None
    hang_timeout_s = float(env.get(HANG_TIMEOUT, HANG_TIMEOUT_S))
    return Member(socket.socket(fileno=int(env[FD])), int(env.get(SLOT, "0")), int(env.get(SLOTS, "1")), memory, hang_timeout_s)


def start_again(why: str) -> None:
    """Aborts this process: its agent starts another, which finds the copy of the state that this one kept."""
    print(f"horoyolo: {why}: a worker starts again", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)


def end(why: str) -> None:
    """Ends this process, whatever its threads do."""
    print(f"horoyolo: {why}: this worker ends", file=sys.stderr, flush=True)
    os._exit(1)


def tcp_sockets() -> dict[int, int]:
    """The connected TCP sockets of this process: inode -> descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with _duplicate(int(name)) as connection:
            if connection is not None:
                found[os.fstat(connection.fileno()).st_ino] = int(name)
    return found


def end_sockets(inodes: set[int]) -> int:
    """Shuts down those of this process's TCP sockets that have these inodes; gives how many. Closing them stays their owner's business."""
    ended = 0
    for inode, descriptor in tcp_sockets().items():
        if inode in inodes:
            with _duplicate(descriptor) as connection, contextlib.suppress(OSError):
                if connection is not None and os.fstat(connection.fileno()).st_ino == inode:
                    connection.shutdown(socket.SHUT_RDWR)
                    ended += 1
    return ended


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket | None]:
    """A descriptor of our own for a connected TCP socket, whose owner may close his at any moment; None for anything else."""
    try:
        own = os.dup(descriptor)
    except OSError:
        yield None
        return
    try:
        if not stat.S_ISSOCK(os.fstat(own).st_mode):
            os.close(own)
            yield None
            return
        connection = socket.socket(fileno=own)
    except OSError:
        os.close(own)
        yield None
        return
    with connection:
        try:
            connection.getpeername()
            is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
        except OSError:
            is_tcp = False
        yield connection if is_tcp else None
