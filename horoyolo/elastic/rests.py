"""How long what has failed is left alone: each time twice as long as the time before, until the failures are forgotten."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

FIRST_REST_S, LONGEST_REST_S, FORGET_S = 10.0, 300.0, 600.0

Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Fault:
    failures: int = 0
    until_s: float = 0.0


class Rests(Generic[Key]):
    """The failures of hosts, or of slots, and how long each rests."""

    def __init__(self) -> None:
        self._faults: dict[Key, _Fault] = {}

    def fail(self, key: Key, now: float) -> float:
        """Counts one more failure; gives the seconds of rest. Ten good minutes after a rest those before are forgotten."""
        fault = self._faults.setdefault(key, _Fault())
        fault.failures = 1 if now - fault.until_s > FORGET_S else fault.failures + 1
        rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** (fault.failures - 1))
        fault.until_s = now + rest_s
        return rest_s

    def rests(self, key: Key, now: float) -> bool:
        """Whether it is to be left alone now."""
        return key in self._faults and now < self._faults[key].until_s

    def failures(self, key: Key) -> int:
        """In a row so far."""
        return self._faults[key].failures if key in self._faults else 0

    def next_s(self, now: float) -> float:
        """Seconds until the next rest ends; infinity where none is under way."""
        return min((fault.until_s - now for fault in self._faults.values() if fault.until_s > now), default=math.inf)
