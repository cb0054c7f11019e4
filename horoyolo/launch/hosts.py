"""Where workers run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A machine and how many workers it takes."""

    name: str
    slots: int


def local_hosts(num_workers: int) -> list[Host]:
    """This machine, for all workers."""
    return [Host("localhost", num_workers)]
