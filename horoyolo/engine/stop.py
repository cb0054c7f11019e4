"""A signal, or a file, asks a run to stop; the run stops with a checkpoint, at a step that all workers agree on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from horoyolo.signals import heeded_requests, leave_lost_terminal

STOP = "STOP"  # the file's name
LOOK_EVERY_S = 1.0
SECOND_SIGNAL_AFTER_S = 2.0  # one Ctrl-C may reach a worker several times: from the terminal and from launchers


class StopRequest:
    """Whether this worker was asked to stop."""

    def __init__(self) -> None:
        self._first_s: float | None = None
        self._file: Path | None = None
        self._looked_s = 0.0

    def watch(self, folder: Path) -> None:
        """From now on a file ``STOP`` in ``folder`` is a request as well."""
        self._file = folder / STOP

    @property
    def pending(self) -> bool:
        """Whether there is a request; looks for the file once a second."""
        if self._first_s is None and self._file is not None and time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = time.monotonic()
            if self._file.exists():
                self._first_s = self._looked_s
        return self._first_s is not None

    def heeded(self) -> None:
        """The run has stopped: the file goes, so that the run can go on one day."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()

    def on_signal(self, signum: int, frame: FrameType | None = None) -> None:
        """Notes the first signal; one that comes at least 2 s later raises KeyboardInterrupt, which ends the worker at once."""
        leave_lost_terminal()  # whatever the signal: it may come from a launcher, whose terminal a single worker shares
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
        elif now_s - self._first_s >= SECOND_SIGNAL_AFTER_S:
            raise KeyboardInterrupt(f"second signal ({signal.Signals(signum).name})")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest that signals set while the block runs; afterwards the handlers are as they were."""
    request = StopRequest()
    before = {number: signal.signal(number, request.on_signal) for number in heeded_requests()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
