"""Which workers and agents hang: judged from the signs of life that they give, with a limit for each."""

from __future__ import annotations

from dataclasses import dataclass

from horoyolo.elastic.channel import LEASE_S, Message

START_LIMIT_S = 600.0  # for a process to give its first sign: imports may come from a busy file server
PAUSE_S = 3.0  # a longer gap between two looks means that the launcher itself stood still: nobody is blamed for what it did not hear


@dataclass
class _Signs:
    heard_s: float
    started: bool = False  # there was a pulse
    waits_in_vain: bool = False  # its generation is broken
    overdue: str = ""


class Watchdog:
    """The signs of life of all workers and agents, told with their time."""

    def __init__(self, hang_timeout_s: float) -> None:
        """``hang_timeout_s``: how long a worker may be without a pulse, or wait in a collective of a broken generation."""
        self.hang_timeout_s = hang_timeout_s
        self._workers: dict[str, _Signs] = {}
        self._hosts: dict[str, float] = {}
        self._looked_s: float | None = None

    def begin_worker(self, name: str, now: float) -> None:
        """A worker's process was started."""
        self._workers[name] = _Signs(now)

    def end_worker(self, name: str) -> None:
        """A worker has ended, or was ended."""
        self._workers.pop(name, None)

    def pulse(self, name: str, message: Message, now: float) -> None:
        """A worker says in which phase its main thread is, for how long, and how long it may be (None: without limit)."""
        signs = self._workers.get(name)
        if signs is None:
            return
        signs.heard_s, signs.started = now, True
        phase, age_s, limit_s = message.get("phase"), message.get("age_s") or 0.0, message.get("limit_s")
        if phase == "wait" and signs.waits_in_vain:
            limit_s = self.hang_timeout_s
        signs.overdue = f"{age_s:.0f} s in phase {phase} at step {message.get('step')}" if limit_s is not None and age_s > limit_s else ""

    def interrupt(self, name: str) -> None:
        """A worker's generation is broken: its collectives must end."""
        if name in self._workers:
            self._workers[name].waits_in_vain = True

    def place(self, name: str) -> None:
        """A worker has a place in a new generation."""
        if name in self._workers:
            self._workers[name].waits_in_vain = False

    def hear_host(self, host: str, now: float) -> None:
        """An agent said something."""
        self._hosts[host] = now

    def forget_host(self, host: str) -> None:
        """A host has no agent any more."""
        self._hosts.pop(host, None)

    def overdue_workers(self, now: float) -> dict[str, str]:
        """Workers that hang, and what was seen of it. Call it again and again, with everything heard that has arrived."""
        self._allow_for_a_pause(now)
        found = {}
        for name, signs in self._workers.items():
            limit_s = self.hang_timeout_s if signs.started else START_LIMIT_S
            if now - signs.heard_s > limit_s:
                found[name] = f"no sign of life for {now - signs.heard_s:.0f} s"
            elif signs.overdue:
                found[name] = signs.overdue
        return found

    def overdue_hosts(self, now: float) -> dict[str, str]:
        """Hosts whose agent is silent; to be called like ``overdue_workers``, before or after it."""
        self._allow_for_a_pause(now)
        return {host: f"no sign of life for {now - heard_s:.0f} s" for host, heard_s in self._hosts.items() if now - heard_s > LEASE_S}

    def _allow_for_a_pause(self, now: float) -> None:
        if self._looked_s is not None and now - self._looked_s > PAUSE_S:
            lost_s = now - self._looked_s
            self._hosts = {host: heard_s + lost_s for host, heard_s in self._hosts.items()}
            for signs in self._workers.values():
                signs.heard_s += lost_s
        self._looked_s = now
