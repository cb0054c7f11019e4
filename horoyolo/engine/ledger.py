"""The keeping of the ledger while a run lasts; what it proves is in ``report/ledger.py``."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horoyolo.engine.hooks import Hook, StepRecord
from horoyolo.report.ledger import FILE, HEADER, Update, lines_from

if TYPE_CHECKING:
    from horoyolo.engine.build import Training

log = logging.getLogger("horoyolo")

REMEMBERED = 256  # updates that every worker knows, which rank 0 may have died without writing
TAIL_BYTES = 128 * REMEMBERED


def last_step(folder: Path) -> int:
    """The step of the last update that the ledger in a run's folder holds; 0 without one."""
    try:
        with (folder / FILE).open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            held = list(lines_from(stream.read().decode(errors="replace")))
    except OSError:
        return 0
    return held[-1].step if held else 0


class Ledger:
    """The last updates that led to the present weights. A part of the run's state: whoever takes the weights of another takes them along."""

    def __init__(self) -> None:
        self.recent: deque[Update] = deque(maxlen=REMEMBERED)

    def note(self, update: Update) -> None:
        """Adds the update that was just done."""
        self.recent.append(update)

    def state_dict(self) -> dict[str, Any]:
        """The updates as lines of the file."""
        return {"recent": "".join(update.line() for update in self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self.recent = deque(lines_from(state["recent"]), maxlen=REMEMBERED)


def note_update(job: Training, finite: bool) -> None:
    """Notes an update between the moment that its images were counted and that at which the run stands at it."""
    before, progress, sampler = job.standing, job.progress, job.sampler
    job.ledger.note(
        Update(
            since=before.position.last_update_step,
            step=progress.step,
            update=progress.update,
            epoch=sampler.epoch,
            first=before.figures["sampler"]["consumed"],
            stop=sampler.consumed,
            of=sampler.num_samples,
            workers=job.comm.size(),
            skipped=int(not finite),
        )
    )


class WriteLedger(Hook):
    """Rank 0 writes. A worker that becomes rank 0 adds what the one before it had not written, or had before it went another way."""

    def __init__(self, job: Training) -> None:
        self._job = job
        self._descriptor: int | None = None
        self._last: Update | None = None  # that was written
        self._told = False

    def before_train(self) -> None:
        self._follow()

    def after_step(self, record: StepRecord, batch: Any) -> None:
        if self._job.progress.last_update_step == record.step:
            self._follow()

    def after_change(self) -> None:
        self._follow()

    def after_train(self) -> None:
        self._follow()
        self._close()

    def _follow(self) -> None:
        recent = self._job.ledger.recent
        if self._job.comm.rank() != 0 or not recent or recent[-1] == self._last:
            return
        try:
            if self._descriptor is not None and len(recent) > 1 and recent[-2] == self._last:
                self._write(recent[-1].line())
            else:
                self._close()
                self._descriptor = os.open(self._job.run.folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                self._write(self._unwritten())
        except OSError as error:
            # The next update tries again, with all that is missing by then.
            self._close()
            if not self._told:
                log.error("%s not written: %s; training goes on", FILE, error)
            self._told = True
        else:
            self._last = recent[-1]
            self._told = False

    def _unwritten(self) -> str:
        """What the file lacks of the updates that this worker knows: the first that it does not hold and all after it."""
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        start = HEADER if not size else "" if tail.endswith("\n") else "\n"  # a line that was torn stays one that can't be read
        held = list(lines_from(tail))
        known_updates, recent = set(held), list(self._job.ledger.recent)
        known = next((index for index, update in enumerate(recent) if update not in known_updates), len(recent))
        if known == len(recent) and recent[-1] != held[-1]:
            known -= 1  # said once more: what comes after it in the file was not to stay
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
