"""Where a run's figures go while it runs: CSV files, TensorBoard, a progress bar."""

from __future__ import annotations

import csv
import io
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from horoyolo.files import atomic_file

log = logging.getLogger("horoyolo")

BAR_WIDTH = 20


class Writer(Protocol):
    """Takes the figures of a step or an epoch."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class CsvWriter:
    """A CSV file with fixed columns, a row a call. A row is written at once and whole, so that a crash leaves no half of one.

    An existing file is gone on with, without the rows whose ``step`` is beyond ``after_step``: a resumed run writes these again. What a full disk
    does not take waits until it does.
    """

    def __init__(self, path: Path, columns: Sequence[str], after_step: int = 0) -> None:
        self._columns = list(columns)
        kept = [row for row in _rows_of(path, self._columns) if int(row["step"]) <= after_step]
        with atomic_file(path, "w") as stream:
            stream.write(self._lines([dict(zip(self._columns, self._columns, strict=True)), *kept]))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._name = path.name
        self._waiting = b""
        self._told = False
        self.last_step = int(kept[-1]["step"]) if kept else 0  # of the newest row

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a row; ``metrics`` holds every column, None for a figure that there is none of."""
        self.last_step = step
        self._waiting += self._lines([metrics]).encode()
        try:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
            self._told = False
        except OSError as error:
            if not self._told:
                log.error("%s: %s; its rows wait, training goes on", self._name, error.strerror)
            self._told = True

    def close(self) -> None:
        os.close(self._descriptor)

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([_short(row[column]) for column in self._columns] for row in rows)
        return text.getvalue()


class TensorBoardWriter:
    """TensorBoard events, a scalar a figure."""

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second: only where it is used

        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)
        self._failed = False

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds every number; what is not a number is left out. After a full disk nothing more is added."""
        try:
            for name, value in metrics.items():
                if isinstance(value, (int, float)) and not self._failed:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._failed = True
            log.error("TensorBoard events: %s; they end here, training goes on", error.strerror)

    def close(self) -> None:
        with suppress(OSError):  # told before
            self._writer.close()


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


def _rows_of(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """The whole rows of an earlier file with the same columns; nothing where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row for row in rows if list(row) == columns and None not in row.values()]


def _short(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else value
