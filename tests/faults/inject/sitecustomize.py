"""What can go wrong inside a process, for tests: Python runs this at its start where the folder is on PYTHONPATH and HOROYOLO_FAULTS names a folder.

Files there say what to do, the host's name behind a dot: ``clock.node2`` holds seconds by which ``time.time`` is off, read again at every call;
``slow.node2`` seconds that the next worker there waits before it does anything. A worker that gets SIGUSR2 ends as one that was out of memory
does, with status 137; after SIGRTMIN its next backward passes, as many as the file ``nan`` says, begin with a loss that is no number; after
SIGRTMIN + 1 its main thread sleeps for an hour.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def skew_clock(offset: Path) -> None:
    """``time.time`` is off by what the file says, while it is there."""
    true_time = time.time

    def skewed() -> float:
        try:
            return true_time() + float(offset.read_text())
        except (OSError, ValueError):  # it is not there, or just being written
            return true_time()

    time.time = skewed


def poison(count: int) -> None:
    """The next backward passes of this process begin with NaN."""
    import torch

    true_backward = torch.Tensor.backward
    left = count

    def backward(loss, *args, **kwargs):
        nonlocal left
        if left == 0:
            return true_backward(loss, *args, **kwargs)
        left -= 1
        return true_backward(loss * float("nan"), *args, **kwargs)

    torch.Tensor.backward = backward


def install(folder: Path) -> None:
    """Arms this process: a worker, or one that workers are forked from."""
    skew_clock(folder / f"clock.{os.uname().nodename}")
    if os.environ.keys() & {"HOROYOLO_ELASTIC_FD", "HOROVOD_RANK"}:
        arm_worker(folder)
    elif "HOROYOLO_FORKS_FD" in os.environ:
        os.register_at_fork(after_in_child=lambda: arm_worker(folder))


def arm_worker(folder: Path) -> None:
    """Signals do what they say above, and the first one waits."""
    signal.signal(signal.SIGUSR2, lambda *_: os._exit(137))
    signal.signal(signal.SIGRTMIN, lambda *_: poison(int((folder / "nan").read_text())))
    signal.signal(signal.SIGRTMIN + 1, lambda *_: time.sleep(3600))
    slow = folder / f"slow.{os.uname().nodename}"
    if slow.exists():
        seconds = float(slow.read_text())
        slow.unlink()
        time.sleep(seconds)


if os.environ.get("HOROYOLO_FAULTS"):
    install(Path(os.environ["HOROYOLO_FAULTS"]))
