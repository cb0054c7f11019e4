"""Writing in the background: one thing at a time, and no failure that ends a run."""

from __future__ import annotations

import logging
from threading import Event

import pytest

from horoyolo.engine.background import Background


def test_one_at_a_time_and_the_last_is_waited_for() -> None:
    background, gate = Background(), Event()
    done: list[str] = []

    def write(name: str) -> None:
        gate.wait(10)
        done.append(name)

    background.start("a", lambda: write("a"))
    assert background.busy
    assert not done
    gate.set()
    background.start("b", lambda: write("b"))
    assert done[0] == "a"
    background.wait()
    assert done == ["a", "b"]
    assert not background.busy
    background.wait()


def test_a_full_disk_is_told_and_the_next_file_is_written(caplog: pytest.LogCaptureFixture) -> None:
    background = Background()
    done: list[str] = []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.ERROR, "horoyolo"):
        background.start("checkpoint of step 3", fail)
        background.start("checkpoint of step 4", lambda: done.append("4"))
        background.wait()
    assert "checkpoint of step 3 NOT WRITTEN" in caplog.text
    assert done == ["4"]
