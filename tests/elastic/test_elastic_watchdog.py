from __future__ import annotations

import pytest

from horoyolo.elastic.watchdog import START_LIMIT_S, Watchdog


@pytest.fixture
def dog() -> Watchdog:
    """Fifteen seconds, one worker ``w`` on host ``h``, begun at 0."""
    dog = Watchdog(15)
    dog.begin_worker("w", 0)
    dog.hear_host("h", 0)
    return dog


def look_until(dog: Watchdog, end_s: int) -> None:
    """Look once a second from 0, as the loop does at least."""
    for now in range(end_s):
        dog.overdue_workers(now)


def pulse(dog: Watchdog, now: float, phase: str = "step", age_s: float = 0, limit_s: float | None = 15) -> None:
    dog.pulse("w", {"step": 7, "phase": phase, "age_s": age_s, "limit_s": limit_s}, now)


def test_a_silent_worker_is_overdue(dog):
    pulse(dog, 1)
    look_until(dog, 16)
    assert not dog.overdue_workers(16)
    assert "15 s" in dog.overdue_workers(16.1)["w"]


def test_one_that_only_starts_has_time(dog):
    look_until(dog, int(START_LIMIT_S))
    assert not dog.overdue_workers(START_LIMIT_S)
    assert dog.overdue_workers(START_LIMIT_S + 1)


@pytest.mark.parametrize(("phase", "limit_s", "overdue"), [("step", 15, True), ("wait", None, False), ("other", 600, False)])
def test_a_phase_that_lasts_too_long(dog, phase, limit_s, overdue):
    pulse(dog, 1, phase, 200, limit_s)
    assert bool(dog.overdue_workers(1)) is overdue
    pulse(dog, 2, phase, 0, limit_s)
    assert not dog.overdue_workers(2)


def test_waiting_in_a_broken_generation_is_limited(dog):
    dog.interrupt("w")
    pulse(dog, 1, "wait", 14, None)
    assert not dog.overdue_workers(1)
    pulse(dog, 2, "wait", 16, None)
    assert dog.overdue_workers(2)
    dog.place("w")
    pulse(dog, 3, "wait", 16, None)
    assert not dog.overdue_workers(3)


@pytest.mark.parametrize("hosts_first", [False, True])
def test_nobody_is_blamed_for_what_a_launcher_that_stood_still_did_not_hear(dog, hosts_first):
    pulse(dog, 1)
    look_until(dog, 5)
    looks = [dog.overdue_workers, dog.overdue_hosts]
    for look in reversed(looks) if hosts_first else looks:
        assert not look(100)
    for now in range(101, 120):
        overdue = dog.overdue_workers(now)
    assert overdue


def test_a_silent_agent_is_overdue(dog):
    look_until(dog, 16)
    assert dog.overdue_hosts(15.5)
    dog.forget_host("h")
    assert not dog.overdue_hosts(15.5)
