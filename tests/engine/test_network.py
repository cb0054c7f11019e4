"""A network that becomes slow is told of; one that always was, a change of workers, and computing that takes longer are not."""

from __future__ import annotations

import logging

import pytest

from horoyolo.engine.hooks import StepRecord
from horoyolo.engine.network import WINDOW_S, WarnSlowNetwork


def record(wait_s: float, compute_s: float = 0.1, workers: int = 3) -> StepRecord:
    figures = dict.fromkeys(("box_loss", "obj_loss", "cls_loss", "loss", "lr", "data_s", "forward_s"), 0.0)
    whole = dict.fromkeys(("step", "epoch", "update", "images", "batch_crc", "wire_bytes"), 0)
    return StepRecord(**figures, **whole, backward_s=compute_s, exchange_wait_s=wait_s, workers=workers)


def warnings(caplog: pytest.LogCaptureFixture, *phases: tuple[int, StepRecord]) -> int:
    caplog.set_level(logging.WARNING, "horoyolo")
    hook = WarnSlowNetwork()
    for count, step in phases:
        for _ in range(count):
            hook.after_step(step, None)
    return len(caplog.records)


def test_a_network_that_becomes_slow_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    slow = record(2.0)
    assert warnings(caplog, (20, record(0.1)), (round(2 * WINDOW_S / 2.1), slow)) == 1
    assert "the network has become slow" in caplog.text


def test_it_is_told_within_a_window(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog, (100, record(0.1)), (round(WINDOW_S / 8) + 1, record(8.0))) == 1


def test_it_is_told_soon_after_the_start_too(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog, (6, record(0.04)), (2, record(16.0))) == 1


def test_what_compression_tries_says_nothing_of_the_network(caplog: pytest.LogCaptureFixture) -> None:
    """As `auto` does on a slow link when computing has changed: plain sums wait as long as many compressed ones."""
    caplog.set_level(logging.WARNING, "horoyolo")
    settled = True
    hook = WarnSlowNetwork(lambda: settled)
    for tried, count, step in ((False, 50, record(0.1)), (True, 4, record(5.0)), (False, 50, record(0.1))):
        settled = not tried
        for _ in range(count):
            hook.after_step(step, None)
    assert not caplog.records
    for _ in range(4):
        hook.after_step(record(5.0), None)
    assert "the network has become slow" in caplog.text


@pytest.mark.parametrize(
    "phases",
    [
        [(5, record(10.0)), (100, record(0.1))],  # whoever comes first waits for the others
        [(100, record(1.0))],
        [(20, record(0.1)), (100, record(0.1, compute_s=5.0))],
        [(20, record(0.1, workers=2)), (100, record(2.0, workers=8))],
    ],
)
def test_nothing_else_is(caplog: pytest.LogCaptureFixture, phases: list[tuple[int, StepRecord]]) -> None:
    assert warnings(caplog, *phases) == 0
