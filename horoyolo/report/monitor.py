"""Where a run's figures go while it runs: CSV files, TensorBoard, a progress bar."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from horoyolo.files import atomic_file

BAR_WIDTH = 20


class Writer(Protocol):
    """Takes the figures of a step or an epoch."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class CsvWriter:
    """A CSV file with fixed columns, a row a call. A row is written at once and whole, so that a crash leaves no half of one.

    An existing file is gone on with, without the rows whose ``step`` is beyond ``after_step``: a resumed run writes these again.
    """

    def __init__(self, path: Path, columns: Sequence[str], after_step: int = 0) -> None:
        self._columns = list(columns)
        kept = [row for row in _rows_of(path, self._columns) if int(row["step"]) <= after_step]
        with atomic_file(path, "w") as stream:
            stream.write(self._lines([dict(zip(self._columns, self._columns, strict=True)), *kept]))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a row; ``metrics`` holds every column, None for a figure that there is none of."""
        os.write(self._descriptor, self._lines([metrics]).encode())

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

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds every number; what is not a number is left out."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


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
