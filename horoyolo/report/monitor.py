"""Where a run's figures go while it runs: CSV files, TensorBoard, a progress bar."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

log = logging.getLogger("horoyolo")

BAR_WIDTH = 20
ROOM_BYTES = 2**20  # for events


class Writer(Protocol):
    """Takes the figures of a step or an epoch."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class CsvWriter:
    """A CSV file with fixed columns, a row a call. A row is written at once and whole, so that a crash leaves no half of one.

    An existing file is gone on with, without the rows whose ``step`` is beyond ``after_step``: a resumed run writes these again. What a full disk
    does not take waits until it does; to go on with a file takes no space.
    """

    def __init__(self, path: Path, columns: Sequence[str], after_step: int = 0) -> None:
        self._path, self._columns, self._after_step = path, list(columns), after_step
        self._descriptor: int | None = None
        self._waiting = b""
        self._told = False
        self.last_step = after_step  # of the newest row; where the file can't be opened, what should be in it
        self._flush()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a row; ``metrics`` holds every column, None for a figure that there is none of."""
        self.last_step = step
        self._waiting += _line([_short(metrics[column]) for column in self._columns])
        self._flush()

    def go_back(self, after_step: int) -> None:
        """Forgets the rows whose ``step`` is beyond ``after_step``, in the file and among those that wait: they will be written again."""
        header = _line(self._columns)
        _, *waiting = _kept(header + self._waiting.removeprefix(header), self._columns, after_step)
        self._waiting = b"".join(waiting)
        if waiting:
            self.last_step = self._step(waiting[-1])
        self.close()
        self._descriptor, self._after_step = None, after_step
        self._flush()

    def close(self) -> None:
        """No row may follow."""
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _flush(self) -> None:
        try:
            if self._descriptor is None:
                self._open()
            assert self._descriptor is not None
            written = os.write(self._descriptor, self._waiting)
            whole = self._waiting.rfind(b"\n", 0, written) + 1
            self._waiting = self._waiting[whole:]
            if whole < written:
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - (written - whole))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._told = False
        except OSError as error:
            if not self._told:
                log.error("%s: %s; its rows wait, training goes on", self._path.name, error.strerror)
            self._told = True

    def _open(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            kept = _kept(self._path.read_bytes(), self._columns, self._after_step)
            os.ftruncate(descriptor, sum(map(len, kept)))
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        if not self._waiting:
            self.last_step = self._step(kept[-1]) if len(kept) > 1 else 0
        if not kept:
            self._waiting = _line(self._columns) + self._waiting

    def _step(self, row: bytes) -> int:
        return int(row.split(b",")[self._columns.index("step")])


class TensorBoardWriter:
    """TensorBoard events, a scalar a figure."""

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second: only where it is used

        self._folder = folder
        self._writer: SummaryWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_room()
            self._writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)
        except OSError as error:
            self._end(error)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds every number; what is not a number is left out. After a full disk nothing more is added."""
        if self._writer is None:
            return
        try:
            self._check_room()
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._end(error)

    def close(self) -> None:
        """Nothing may follow."""
        if self._writer is not None:
            with suppress(OSError):  # what was written stays
                self._writer.close()

    def _check_room(self) -> None:
        """Raises OSError where the disk is about to be full: the thread that writes events would tell it by a traceback."""
        if shutil.disk_usage(self._folder).free < ROOM_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _end(self, error: OSError) -> None:
        self.close()
        self._writer = None
        log.error("TensorBoard events: %s; they end here, training goes on", error.strerror)


def import_writers() -> None:
    """What takes long when the first writer is made."""
    import torch.utils.tensorboard  # noqa: F401


class Progress:
    """An epoch's progress: a bar that moves on a terminal; elsewhere, as under a launcher, a line with a bar every ``every_s`` seconds."""

    def __init__(self, stream: TextIO = sys.stderr, every_s: float = 10.0) -> None:
        self._stream = stream
        self._every_s = every_s
        self._last_line_s = time.monotonic()
        self._bar: tqdm | None = None
        self._text, self._total, self._done = "", 0, 0

    def start(self, text: str, total: int, done: int = 0) -> None:
        """Begins an epoch of ``total`` images, of which ``done`` are behind us."""
        self.close()
        self._text, self._total, self._done = text, total, done
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=done, desc=text, unit="img", file=self._stream, dynamic_ncols=True, leave=True)

    def advance(self, images: int, figures: str) -> None:
        """Counts images; ``figures`` stands behind the bar."""
        self._done += images
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(images)
        elif time.monotonic() - self._last_line_s >= self._every_s:
            self._last_line_s = time.monotonic()
            filled = BAR_WIDTH * self._done // max(self._total, 1)
            bar = "#" * filled + "." * (BAR_WIDTH - filled)
            print(f"{self._text} [{bar}] {self._done}/{self._total} images, {figures}", file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _kept(content: bytes, columns: list[str], after_step: int) -> list[bytes]:
    """The lines of an earlier file to go on with, header included: up to ``after_step`` or a torn one; nothing where the columns are others."""
    first, *rows = content.splitlines(keepends=True) or [b""]
    if first != _line(columns):
        return []

    def stays(row: bytes) -> bool:
        cells = row.split(b",")
        step = cells[columns.index("step")] if len(cells) == len(columns) and row.endswith(b"\n") else b""
        return step.isdigit() and int(step) <= after_step

    return [first, *takewhile(stays, rows)]


def _line(values: Iterable[Any]) -> bytes:
    return ",".join(map(str, values)).encode() + b"\n"


def _short(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else value
