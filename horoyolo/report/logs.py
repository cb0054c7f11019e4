"""Log lines that say who speaks: rank and host."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path


class RunLog(logging.FileHandler):
    """A log in a file. A disk that is full costs lines of it; that is said once, on standard error."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            with suppress(OSError):  # which may be a file on the same disk
                print(f"horoyolo: {self.baseFilename}: {error.strerror}; lines are missing there", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Also what waited for the disk is lost then."""
        with suppress(OSError):
            super().close()


def start_logs(rank: int | None, size: int) -> None:
    """Sends the package's log to standard error: rank 0 everything, the others (None: without a rank yet) warnings and worse, with their name."""
    root = logging.getLogger("horoyolo")
    root.setLevel(logging.INFO)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    who = socket.gethostname() if rank is None else f"rank {rank} {socket.gethostname()}"
    screen.setFormatter(logging.Formatter("%(message)s" if size == 1 else f"[{who}] %(message)s"))
    root.addHandler(screen)


def log_to_file(folder: Path, rank: int) -> None:
    """Sends everything to ``folder/rank-N.log`` too, appended: a resumed run goes on in the same file. Raises OSError where there can be none."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = RunLog(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} {socket.gethostname()} pid {os.getpid()}: %(message)s"))
    logging.getLogger("horoyolo").addHandler(handler)
