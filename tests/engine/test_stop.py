"""Signals ask for a stop; only a second one, later, insists."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from horoyolo.engine import stop
from horoyolo.engine.stop import stop_on_signals


def test_a_signal_is_noted_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as request:
        assert not request.pending
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # at once: the same wish
        assert request.pending
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_signal_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "SECOND_SIGNAL_AFTER_S", 0.0)
    with stop_on_signals() as request:
        request.on_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            request.on_signal(signal.SIGTERM)


def test_a_file_is_a_request_until_it_was_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "LOOK_EVERY_S", 0.0)
    request = stop.StopRequest()
    request.watch(tmp_path)
    assert not request.pending
    (tmp_path / "STOP").touch()
    assert request.pending
    request.heeded()
    assert not (tmp_path / "STOP").exists()
    assert request.pending  # this run ends all the same
    again = stop.StopRequest()
    again.watch(tmp_path)
    assert not again.pending
    again.heeded()


def test_the_file_is_looked_for_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=100.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr(stop, "time", clock)
    request = stop.StopRequest()
    request.watch(tmp_path)
    assert not request.pending
    (tmp_path / "STOP").touch()
    clock.now_s += 0.9
    assert not request.pending
    clock.now_s += 0.2
    assert request.pending
