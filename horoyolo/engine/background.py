"""Files written beside the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread

log = logging.getLogger("horoyolo")


class Background:
    """Does one thing at a time in a thread. A disk that is full, or gone, costs what was to be written, not the run."""

    def __init__(self) -> None:
        self._thread: Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, what: str, task: Callable[[], object]) -> None:
        """Begins ``task``, which writes ``what``, when the one before it is done. The task must not touch what training changes."""
        self.wait()
        # Not a daemon: who leaves early still finishes the file.
        self._thread = Thread(target=attempt, args=(what, task), name=f"write {what}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def attempt(what: str, task: Callable[[], object]) -> None:
    """Does ``task``, which writes ``what``. What a disk refuses is told in the log."""
    try:
        task()
    except OSError as error:
        log.error("%s NOT WRITTEN: %s; training goes on", what, error)
