"""What ``Membership`` wants to be done, and the numbering of a generation's workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from horoyolo.launch.hosts import Host


@dataclass(frozen=True)
class Place:
    """A worker's place in a generation, as Horovod numbers it."""

    worker: str
    host: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


@dataclass(frozen=True)
class OpenHost:
    """Start the agent of a host."""

    host: Host


@dataclass(frozen=True)
class CloseHost:
    """End the agent of a host, which has no worker any more."""

    host: str


@dataclass(frozen=True)
class StartWorker:
    """Start a worker in a slot."""

    worker: str
    host: str
    slot: int
    slots: int  # of its host


@dataclass(frozen=True)
class EndWorker:
    """Kill a worker."""

    worker: str
    why: str


@dataclass(frozen=True)
class Form:
    """Give these workers their places in a new generation; with ``stop``, only to leave a checkpoint together."""

    generation: int
    places: tuple[Place, ...]
    stop: bool


@dataclass(frozen=True)
class Interrupt:
    """A generation is broken: these workers are to end its sockets."""

    generation: int
    workers: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """Have a generation end in order; ``leaving`` ones for good."""

    generation: int
    staying: tuple[str, ...]
    leaving: tuple[str, ...]


@dataclass(frozen=True)
class Tell:
    """A line for the user."""

    line: str


@dataclass(frozen=True)
class Finish:
    """The job is over."""

    status: int
    why: str


Action = OpenHost | CloseHost | StartWorker | EndWorker | Form | Interrupt | Change | Tell | Finish


def number_places(workers: Sequence[tuple[str, str]]) -> tuple[Place, ...]:
    """Places for (worker, host) pairs in rank order. Local rank: which of its host; cross rank: which host among those with such a local rank."""
    seen: dict[str, int] = {}
    local_ranks = []
    for _, host in workers:
        local_ranks.append(seen.get(host, 0))
        seen[host] = seen.get(host, 0) + 1
    places = []
    for rank, ((worker, host), local_rank) in enumerate(zip(workers, local_ranks, strict=True)):
        hosts = [name for name, count in seen.items() if count > local_rank]
        places.append(Place(worker, host, rank, len(workers), local_rank, seen[host], hosts.index(host), len(hosts)))
    return tuple(places)
