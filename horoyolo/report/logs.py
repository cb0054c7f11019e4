"""Log lines that say who speaks: rank and host."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path


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
    """Sends everything to ``folder/rank-N.log`` too, appended: a resumed run goes on in the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} {socket.gethostname()} pid {os.getpid()}: %(message)s"))
    logging.getLogger("horoyolo").addHandler(handler)
