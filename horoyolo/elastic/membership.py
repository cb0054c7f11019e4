"""Who takes part in an elastic job: what to start, what to end, when to form a generation and with which ranks.

A **generation** is a set of workers with ranks and a rendezvous of their own. It is *joining* until all have joined, then *up*, and ends in one
of two ways: *broken* (somebody died: the rest are interrupted) or *changing* (in order: all leave after an agreed update, some for good).
The next one is formed when every worker of the last that lives is ready again, with the newcomers that are ready by then.

Here is no clock, no process and no network: every event comes with its time, and ``decide`` says what is to be done. One dead worker costs
its own slot for a while, a lost host itself, each failure twice as long as the one before; ten good minutes and it is forgotten.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from horoyolo.elastic.actions import (
    Action,
    Change,
    CloseHost,
    EndWorker,
    Finish,
    Form,
    Interrupt,
    OpenHost,
    StartWorker,
    Tell,
    number_places,
)
from horoyolo.elastic.rests import Rests
from horoyolo.launch.hosts import Host
from horoyolo.launch.status import job_status

START_PATIENCE_S = 30.0  # at the start, for workers and hosts that are slower than the first min_np
GATHER_S = 5.0  # a newcomer waits for others that are about to be ready: each change costs all workers a moment
BELOW_LIMIT_S = 600.0  # how long fewer workers than wanted are waited for
JOIN_LIMIT_S = 15.0  # after a break, for a worker that was joining to fail
END_LIMIT_S = 15.0  # for a process to be gone, before it is killed, and killed again
DONE_LIMIT_S = 15.0  # after the first worker was done, for the others
TRIES = 3  # to reach a host, before it is given up at the start
FRUITLESS = 10  # generations in a row that never came up, or that broke without a death and without having lasted FRUITFUL_S
FRUITFUL_S = 30.0
ABORTED = (-signal.SIGABRT, 128 + signal.SIGABRT)

STARTING, READY, JOINING, UP, ENDING = "starting", "ready", "joining", "up", "ending"
BROKEN, CHANGING = "broken", "changing"


@dataclass(frozen=True)
class Limits:
    """How many workers a job may have; ``max_np`` None: as many as there are slots."""

    min_np: int
    max_np: int | None = None


@dataclass(eq=False)  # each is one of its own; among hundreds, comparing them by their figures takes long
class Worker:
    """One process of the job."""

    name: str
    host: str
    slot: int
    state: str = STARTING
    generation: int = 0  # the last one it had a place in
    rank: int = -1  # there
    ready_s: float = 0.0
    ending_s: float = 0.0  # since when it is to be gone
    done: bool = False


@dataclass
class Generation:
    """The generation that is formed now, or the last one."""

    number: int
    members: tuple[str, ...]
    formed_s: float
    began_s: float  # when that happened which led to it
    state: str = JOINING
    changing_s: float = 0.0
    broken_s: float = 0.0
    was_up: bool = False
    interrupted: bool = False
    deaths: int = 0
    statuses: list[int] = field(default_factory=list)  # of members that ended after all had joined


class Membership:
    """The state of a job's hosts and workers; methods are events, and ``decide`` gives what follows from them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.hosts: list[Host] = []
        self.workers: dict[str, Worker] = {}
        self.generation: Generation | None = None
        self.stopping = False
        self.too_few = False  # why it stops
        self.finished: Finish | None = None
        self._open: dict[str, bool] = {}  # host -> whether its agent is ready
        self._closing: set[str] = set()  # hosts whose agent was told to end: only when it has may there be another, which it would kill
        self._slot_rests = Rests[tuple[str, int]]()
        self._host_rests = Rests[str]()
        self._started = 0  # workers so far: their names
        self._statuses: list[int] = []  # of workers that ended on request, or with nothing to do
        self._enough_s: float | None = None  # since when min_np workers are ready for the first generation
        self._below_s: float | None = None  # since when there are too few
        self._below_told = False
        self._done_s: float | None = None
        self._fruitless = 0
        self._unformed = 0  # generations in a row that never came up
        self._lines: list[str] = []

    # -- events

    def found(self, hosts: Sequence[Host]) -> None:
        """The list of hosts as it is now."""
        self.hosts = list(hosts)

    def host_ready(self, host: str) -> None:
        """The agent of a host is there."""
        self._open[host] = True

    def host_lost(self, host: str, why: str, now: float) -> None:
        """The agent of a host could not be started, has ended or is silent; its workers count as dead."""
        if host not in self._open:
            return
        del self._open[host]
        if host in self._closing:
            self._closing.remove(host)
            return
        rest_s = self._host_rests.fail(host, now)
        lost = [worker for worker in self.workers.values() if worker.host == host]
        told = f", with {len(lost)} workers" if lost else ""
        self._lines.append(f"{host} is lost{told}: {why}; tried again in {rest_s:.0f} s")
        for worker in lost:
            self._remove(worker, now)

    def ready(self, name: str, generation: int, now: float) -> None:
        """A worker wants a place, having left ``generation``."""
        worker = self._living(name)
        if worker is None or worker.generation != generation:
            return
        if self._is_current(worker) and self.generation and self.generation.state in (JOINING, UP):
            self._break(now)  # it left by itself
        worker.state, worker.ready_s = READY, now

    def joined(self, name: str, generation: int) -> None:
        """A worker has found all others of a generation."""
        worker = self._living(name)
        if worker is not None and worker.state == JOINING and worker.generation == generation:
            worker.state = UP

    def broken(self, name: str, generation: int, now: float) -> None:
        """A worker's collective has failed."""
        worker = self._living(name)
        if worker is not None and worker.generation == generation and self._is_current(worker):
            self._break(now)

    def left(self, name: str, now: float) -> None:
        """A worker has left for good, as it was told."""
        worker = self._living(name)
        if worker is not None:
            worker.state, worker.ending_s = ENDING, now

    def done(self, name: str, now: float) -> None:
        """A worker has finished the run: all others have too, or are about to."""
        if name in self.workers:
            self.workers[name].done = True
            self._done_s = self._done_s or now

    def kill(self, name: str, why: str, now: float) -> list[Action]:
        """Somebody found that a worker hangs: it counts as dead from now on."""
        worker = self._living(name)
        if worker is None:
            return []
        self._count_fault(worker, f"hangs ({why}) and is killed", now)
        self._mark_dead(worker, now)
        return [EndWorker(name, why)]

    def ended(self, name: str, status: int, now: float) -> None:
        """A worker's process has ended, ``status`` negative for a signal."""
        worker = self.workers.get(name)
        if worker is None:
            return
        if worker.state == ENDING:
            del self.workers[name]
        elif status in (0, 75) or worker.done:
            self._statuses.append(status)
            if status == 75:
                self.stopping = True
            else:
                self._done_s = self._done_s or now
            del self.workers[name]
        elif self.generation is None and status > 0 and status not in ABORTED:
            self._finish(status if status == 2 else 1, f"worker {name} failed before the first step (exit status {status})")
        elif self.generation and self.generation.state == BROKEN and (worker.state == JOINING or status in ABORTED):
            # Who was joining has no way out; most abort, some fail. An abort of another one says that a collective blocks it.
            self._lines.append(f"worker {name} could not leave generation {worker.generation}, which is broken: it is started again")
            self._remove(worker, now)
        else:
            if self._is_current(worker) and self.generation and worker.state == UP:
                self.generation.statuses.append(status)
            self._count_fault(worker, describe(status), now)
            self._remove(worker, now)

    def stop(self) -> None:
        """The user wants the job to stop with a checkpoint."""
        self.stopping = True

    # -- what follows

    def is_up(self) -> bool:
        """Whether all workers of the present generation have found each other."""
        return self.generation is not None and self.generation.state == UP

    def decide(self, now: float) -> list[Action]:
        """What is to be done now; it counts as done."""
        actions: list[Action] = []
        wanted = self._wanted()
        self._check_end(now)
        if self.finished is None:
            actions += self._generation(wanted, now)
            actions += self._staff(wanted, now)
        lines, self._lines = [Tell(line) for line in self._lines], []
        return [*lines, *actions, *([self.finished] if self.finished else [])]

    def next_s(self, now: float) -> float:
        """Seconds until ``decide`` may have something new to say by the passing of time alone, at most one."""
        return min(1.0, self._slot_rests.next_s(now), self._host_rests.next_s(now))

    def _wanted(self) -> set[str]:
        """Names of the living workers that have a slot in the present list of hosts, oldest first, at most max_np."""
        slots = {host.name: host.slots for host in self.hosts}
        fit = [worker for worker in self._by_age() if worker.slot < slots.get(worker.host, 0)]
        return {worker.name for worker in fit[: self.limits.max_np]}

    def _by_age(self) -> list[Worker]:
        """The living workers: those with a rank by rank, then newcomers as they were started."""
        living = [worker for worker in self.workers.values() if worker.state != ENDING]
        return sorted(living, key=lambda worker: (worker.rank < 0, worker.rank))

    def _members(self) -> list[Worker]:
        """The living workers of the present generation."""
        members = self.generation.members if self.generation else ()
        return [self.workers[name] for name in members if name in self.workers and self.workers[name].state != ENDING]

    def _generation(self, wanted: set[str], now: float) -> list[Action]:
        """What the present generation is to be told, and the next one when it is time."""
        present, members = self.generation, self._members()
        newcomers = [worker for worker in self._by_age() if worker.name in wanted and worker.state == READY and worker not in members]
        if present is None or not members:
            return self._first(newcomers, now)
        if present.state == JOINING and all(worker.state == UP for worker in members):
            present.state, present.was_up = UP, True
            self._unformed = 0
            took = f"{now - present.began_s:.2f} s after the change"
            self._lines.append(f"generation {present.number}: {len(members)} workers on {_hosts(members)}, {took}")
        if present.state == UP:
            if now - present.formed_s > FRUITFUL_S:
                self._fruitless = 0
            return self._change(members, newcomers, wanted, now)
        if present.state not in (BROKEN, CHANGING):
            return []
        actions: list[Action] = []
        if present.state == BROKEN and not present.interrupted:
            present.interrupted = True
            actions.append(Interrupt(present.number, tuple(worker.name for worker in members if worker.state != READY)))
        if present.state == BROKEN and now - present.broken_s > JOIN_LIMIT_S:
            for worker in members:
                if worker.state == JOINING:  # not its fault: it is started again at once
                    actions.append(self._end(worker, "it does not come out of a broken rendezvous", now))
            members = self._members()
        if self._done_s is None and all(worker.state == READY for worker in members):
            actions += self._form([*members, *([] if self.stopping else newcomers)], now)
        return actions

    def _first(self, ready: list[Worker], now: float) -> list[Action]:
        """The first generation, once there are enough and the others had their time."""
        if self._done_s is not None:
            return []
        if len(ready) < self.limits.min_np:
            self._enough_s = None
            self._wait_below(len(ready), now)
            return []
        self._below_s = None
        self._enough_s = now if self._enough_s is None else self._enough_s
        awaited = self._free_slots(now) or any(worker.state == STARTING for worker in self.workers.values())
        if awaited and now - self._enough_s < START_PATIENCE_S and len(ready) != self.limits.max_np:
            return []
        return self._form(ready, now)

    def _change(self, members: list[Worker], newcomers: list[Worker], wanted: set[str], now: float) -> list[Action]:
        """An orderly end of the present generation, when somebody is to come or to go."""
        assert self.generation is not None
        if self.stopping or self._done_s is not None:
            return []
        staying = [worker for worker in members if worker.name in wanted]
        leaving = [worker for worker in members if worker.name not in wanted]
        starting = any(worker.state == STARTING and worker.name in wanted for worker in self.workers.values())
        gathered = newcomers and (not starting or now - min(worker.ready_s for worker in newcomers) >= GATHER_S)
        # Who holds the state may only go when somebody stays who holds it too.
        if not gathered and not (leaving and staying):
            return []
        if not staying:
            leaving = []
        self.generation.state, self.generation.changing_s = CHANGING, now
        coming = f"{len(newcomers)} workers come ({_hosts(newcomers)})" if newcomers else ""
        going = f"{len(leaving)} workers leave ({_hosts(leaving)})" if leaving else ""
        self._lines.append(f"{' and '.join(filter(None, (coming, going)))}: generation {self.generation.number} ends after the next update")
        gone = tuple(worker.name for worker in leaving)
        return [Change(self.generation.number, tuple(worker.name for worker in members if worker not in leaving), gone)]

    def _form(self, ready: list[Worker], now: float) -> list[Action]:
        """The next generation, or nothing while there are too few workers for it."""
        stop = self.stopping
        if len(ready) < self.limits.min_np and not stop:
            self._wait_below(len(ready), now)
            if not self._below_for_too_long(now) or not any(worker.rank >= 0 for worker in ready):
                return []
            stop = self.stopping = self.too_few = True
        if not ready:
            return []
        self._below_s = None
        last = self.generation
        if last is not None and last.state == BROKEN:
            self._unformed += not last.was_up
            self._fruitless += not last.deaths and now - last.formed_s < FRUITFUL_S
        number = last.number + 1 if last else 1
        # The ranks of a host are neighbours, hosts in the order of their oldest worker: survivors keep their order.
        oldest: dict[str, int] = {}
        ready = sorted(ready, key=lambda worker: (worker.rank < 0, worker.rank))
        for number_so_far, worker in enumerate(ready):
            oldest.setdefault(worker.host, number_so_far)
        ready = sorted(ready, key=lambda worker: oldest[worker.host])
        places = number_places([(worker.name, worker.host) for worker in ready])
        for worker, place in zip(ready, places, strict=True):
            worker.state, worker.generation, worker.rank = JOINING, number, place.rank
        began_s = now
        if last is not None:
            began_s = last.broken_s if last.state == BROKEN else last.changing_s
        self.generation = Generation(number, tuple(worker.name for worker in ready), now, began_s)
        return [Form(number, places, stop)]

    def _wait_below(self, num_ready: int, now: float) -> None:
        """Note that there are too few workers."""
        if self._below_s is None:
            self._below_s, self._below_told = now, False
        waited_s = now - self._below_s
        # At the start all are missing for a moment.
        if not self._below_told and (self.generation is not None or waited_s >= START_PATIENCE_S):
            self._below_told = True
            wanted = f"at least {self.limits.min_np} are wanted (--min-np)"
            self._lines.append(f"{num_ready} workers are ready, {wanted}: waiting for more, {BELOW_LIMIT_S - waited_s:.0f} s")

    def _staff(self, wanted: set[str], now: float) -> list[Action]:
        """Workers and agents to start and to end."""
        actions: list[Action] = []
        members = self._members()
        for worker in self.workers.values():
            if worker.state in (STARTING, READY) and worker not in members and (self.stopping or worker.name not in wanted):
                actions.append(self._end(worker, "it is not needed any more", now))
            elif worker.state == ENDING and now - worker.ending_s > END_LIMIT_S:
                actions.append(self._end(worker, "it does not end", now))
        if self.stopping or self._done_s is not None:
            return actions
        for host, slot in self._free_slots(now):
            if host.name not in self._open:
                self._open[host.name] = False
                actions.append(OpenHost(host))
            elif self._open[host.name]:
                self._started += 1
                worker = Worker(f"{host.name}/{slot}#{self._started}", host.name, slot)
                self.workers[worker.name] = worker
                actions.append(StartWorker(worker.name, host.name, slot, host.slots))
        named = {host.name for host in self.hosts}
        for name in [name for name, is_ready in self._open.items() if is_ready and name not in named]:
            if not any(worker.host == name for worker in self.workers.values()):
                self._open[name] = False
                self._closing.add(name)
                actions.append(CloseHost(name))
        return actions

    def _free_slots(self, now: float) -> list[tuple[Host, int]]:
        """The slots in which workers are to be started now, or as soon as their host has an agent."""
        taken = {(worker.host, worker.slot) for worker in self.workers.values()}
        room = len([host for host in self.hosts for _ in range(host.slots)])
        if self.limits.max_np is not None:
            room = self.limits.max_np - len(self._wanted())
        free = [
            (host, slot)
            for host in self.hosts
            if not self._host_rests.rests(host.name, now)
            for slot in range(host.slots)
            if (host.name, slot) not in taken and not self._slot_rests.rests((host.name, slot), now)
        ]
        return free[: max(0, room)]

    # -- ends

    def _check_end(self, now: float) -> None:
        """Whether the job is over."""
        living = [worker for worker in self.workers.values() if worker.state != ENDING]
        if self.finished is not None:
            return
        if self._done_s is not None:
            waiting = all(worker.state == READY for worker in living) or now - self._done_s > DONE_LIMIT_S
            if waiting:
                self._finish(job_status(self._statuses or [0]), "")
        elif self.stopping:
            if not any(worker.rank >= 0 for worker in living):
                # 75 without a worker that says so, too: an earlier start of the job may have left a checkpoint to go on from.
                self._finish(job_status(self._statuses or [75]), "" if self._statuses else "stopped with nothing to save")
        elif self.generation is None:
            self._check_start(now)
        elif not self._members():
            failed = [status for status in self.generation.statuses if status > 0 and status not in ABORTED]
            if failed:
                self._finish(job_status(failed), "the last workers failed by themselves")
            elif self._below_for_too_long(now) and not any(worker.rank >= 0 for worker in living):
                self._finish(1, f"no worker was left for {BELOW_LIMIT_S:.0f} s")
        if max(self._fruitless, self._unformed) >= FRUITLESS:
            self._finish(1, f"{FRUITLESS} times in a row workers did not find, or lost, each other: see their network and --nic (horoyolo doctor)")

    def _below_for_too_long(self, now: float) -> bool:
        """Whether too few workers have been ready for too long, and too few are about to be: a first scan of many images takes its time."""
        wanted = self._wanted()
        coming = [worker for worker in self.workers.values() if worker.state in (STARTING, READY) and worker.name in wanted]
        return self._below_s is not None and now - self._below_s >= BELOW_LIMIT_S and len(coming) < self.limits.min_np

    def _check_start(self, now: float) -> None:
        """Whether a job that has not begun never will."""
        reachable = sum(host.slots for host in self.hosts if self._host_rests.failures(host.name) < TRIES)
        if reachable < self.limits.min_np <= sum(host.slots for host in self.hosts):
            lost = ", ".join(host.name for host in self.hosts if self._host_rests.failures(host.name) >= TRIES)
            self._finish(1, f"{lost} can't be used, the others have fewer than {self.limits.min_np} slots (horoyolo doctor looks closer)")
        elif self._below_for_too_long(now):
            self._finish(1, f"fewer than {self.limits.min_np} workers (--min-np) for {BELOW_LIMIT_S:.0f} s")

    def _finish(self, status: int, why: str) -> None:
        self.finished = self.finished or Finish(status, why)

    # -- deaths

    def _living(self, name: str) -> Worker | None:
        worker = self.workers.get(name)
        return None if worker is None or worker.state == ENDING else worker

    def _is_current(self, worker: Worker) -> bool:
        return self.generation is not None and worker.generation == self.generation.number

    @staticmethod
    def _end(worker: Worker, why: str, now: float) -> EndWorker:
        """A worker is to be gone; its slot is taken until its process is."""
        worker.state, worker.ending_s = ENDING, now
        return EndWorker(worker.name, why)

    def _mark_dead(self, worker: Worker, now: float) -> None:
        """A worker is dead, or as good as dead: its generation can't go on."""
        if self._is_current(worker) and worker.state in (JOINING, UP) and not worker.done and self.generation:
            self.generation.deaths += 1
            self._break(now)
        worker.state, worker.ending_s = ENDING, now

    def _remove(self, worker: Worker, now: float) -> None:
        self._mark_dead(worker, now)
        del self.workers[worker.name]

    def _break(self, now: float) -> None:
        """The present generation can't go on."""
        present = self.generation
        if present is not None and present.state in (JOINING, UP, CHANGING):
            present.state, present.broken_s = BROKEN, now

    def _count_fault(self, worker: Worker, what: str, now: float) -> None:
        rest_s = self._slot_rests.fail((worker.host, worker.slot), now)
        rank = f", rank {worker.rank}," if worker.rank >= 0 else ""
        others = len([other for other in self._members() if other is not worker])
        on = f"{others} go on; " if rank else ""
        self._lines.append(f"worker {worker.name}{rank} {what}: {on}its slot is used again in {rest_s:.0f} s")


def describe(status: int) -> str:
    """What an exit status says, negative for a signal."""
    if status >= 0:
        return f"failed (exit status {status})"
    try:
        return f"died ({signal.Signals(-status).name})"
    except ValueError:
        return f"died (signal {-status})"


def _hosts(workers: Iterable[Worker]) -> str:
    """Where workers are: ``node1 x2, node2``."""
    counts: dict[str, int] = {}
    for worker in workers:
        counts[worker.host] = counts.get(worker.host, 0) + 1
    return ", ".join(f"{host} x{count}" if count > 1 else host for host, count in counts.items())
