"""Signals ask for a stop; only a second one, later, insists."""

from __future__ import annotations

import os
import signal

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
