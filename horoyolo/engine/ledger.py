"""The keeping of the ledger while a run lasts; what it proves is in ``report/ledger.py``."""

from __future__ import annotations

import logging
import os
from collections import deque
from typing import Any

from horoyolo.engine.build import Training
from horoyolo.engine.hooks import Hook, StepRecord
from horoyolo.report.ledger import FILE, HEADER, Update, lines_from

log = logging.getLogger("horoyolo")

REMEMBERED = 1024  # updates that every worker knows, which rank 0 may have died without writing
TAIL_BYTES = 128 * REMEMBERED


class KeepLedger(Hook):
    """Every worker takes note of updates, rank 0 writes them. A worker that becomes rank 0 adds what the one before it had not written."""

    def __init__(self, job: Training) -> None:
        self._job = job
        self._recent: deque[Update] = deque(maxlen=REMEMBERED)
        self._descriptor: int | None = None
        self._told = False
        self._step = self._since = job.progress.last_update_step
        self._images = 0

    def after_step(self, record: StepRecord, batch: Any) -> None:
        if record.step != self._step + 1:  # the run went back, or this worker has come to it: such a moment lies between two updates
            self._since, self._images = record.step - 1, 0
        self._step = record.step
        self._images += record.images
        progress, sampler = self._job.progress, self._job.sampler
        if progress.last_update_step != record.step:
            return
        stop = sampler.consumed
        skipped = int(progress.skipped_updates > 0)
        first = stop - self._images
        self._note(Update(self._since, record.step, record.update, record.epoch, first, stop, sampler.num_samples, record.workers, skipped))
        self._since, self._images = record.step, 0

    def after_train(self) -> None:
        self._close()

    def _note(self, update: Update) -> None:
        while self._recent and self._recent[-1].step > update.since:
            self._recent.pop()
        self._recent.append(update)
        if self._job.comm.rank() != 0:
            self._close()
            return
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
                self._write(self._unwritten())
            else:
                self._write(update.line())
        except OSError as error:
            # The next update tries again, with all that is missing by then.
            self._close()
            if not self._told:
                log.error("%s not written: %s; training goes on", FILE, error)
            self._told = True
        else:
            self._told = False

    def _open(self) -> int:
        return os.open(self._job.run.folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def _unwritten(self) -> str:
        """What the file lacks of the updates that this worker knows: the first that it does not hold and all after it."""
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        start = HEADER if not size else "" if tail.endswith("\n") else "\n"  # a line that was torn stays one that can't be read
        held = set(lines_from(tail))
        recent = list(self._recent)
        known = next((index for index, update in enumerate(recent) if update not in held), len(recent))
        return start + "".join(update.line() for update in recent[known:])

    def _write(self, text: str) -> None:
        assert self._descriptor is not None
        content = text.encode()
        if os.write(self._descriptor, content) != len(content):
            raise OSError("no space for a whole line")

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
