"""Steps that others have completed, as seen from outside: workers add rows to a file, whoever waits for them reads along."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from horoyolo.launch.remote import LaunchError

POLL_S = 0.002


class RowFile:
    """A file of rows that several processes add to, each row whole."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, *values: object) -> None:
        """Writes one row."""
        os.write(self._descriptor, (",".join(map(str, values)) + "\n").encode())


@dataclass(frozen=True)
class Seen:
    """A step that was completed by so many workers together."""

    step: int
    workers: int
    process: str  # who says so; empty where the rows do not tell


@dataclass(frozen=True)
class Record:
    """The steps of a run: rows of ``steps.csv``, or of a peer's file, which has no head."""

    path: Path
    workers_column: int = 2
    process_columns: tuple[int, ...] = (3, 4)

    def steps(self) -> list[Seen]:
        """All whole rows so far, in the order in which they were written."""
        try:
            *lines, _ = self.path.read_text().split("\n")
        except FileNotFoundError:
            return []
        rows = (line.split(",") for line in lines)
        return [self._seen(row) for row in rows if row[0].isdigit()]

    def _seen(self, row: list[str]) -> Seen:
        return Seen(int(row[0]), int(row[self.workers_column]), " ".join(row[column] for column in self.process_columns))

    def wait(self, found: Callable[[list[Seen]], Seen | None], alive: Callable[[], None], limit_s: float) -> tuple[Seen, float]:
        """The first step that ``found`` picks, and when it was seen by ``time.monotonic``. ``alive`` raises when there is nobody to wait for;
        LaunchError: not within ``limit_s``."""
        end_s = time.monotonic() + limit_s
        known: tuple[int, int] | None = None
        while True:
            alive()
            try:
                status = self.path.stat()
                now = (status.st_ino, status.st_size)  # whoever takes the file over may write it anew
            except FileNotFoundError:
                now = None
            seen_s = time.monotonic()
            if now != known:
                known = now
                step = found(self.steps())
                if step is not None:
                    return step, seen_s
            if seen_s > end_s:
                raise LaunchError(f"{self.path}: no such step within {limit_s:.0f} s")
            time.sleep(POLL_S)
