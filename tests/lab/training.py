"""A small training on the lab's hosts, and what can be seen of it from outside: its steps and its processes."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import HostProcess, Lab

TIMEOUT_S = 240
LOSSES = ("box_loss", "obj_loss", "cls_loss", "loss")
EPOCHS = 2  # of three steps
# The hosts share this machine's cores and don't know: each worker would take all of them.
ENV = {"OMP_NUM_THREADS": "1"}
HOROYOLO = [sys.executable, "-m", "horoyolo"]


def train_words(dataset: Path, project: Path, epochs: int = EPOCHS, name: str = "run") -> list[str]:
    """The words of ``horoyolo train`` for a run in PROJECT/NAME."""
    size = ["--cfg", "yolov5n", "--img", 64, "--batch", 16, "--precision", "fp32", "--sync-bn", "--workers", 0, "--epochs", epochs]
    place = ["--data", dataset, "--project", project, "--name", name, "--set", f"evaluate_every={epochs}"]
    return ["train", *map(str, [*size, *place])]


def steps(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's steps.csv so far."""
    path = folder / "steps.csv"
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def check_same_run(together: list[dict[str, str]], alone: list[dict[str, str]], num_workers: int) -> None:
    """Fail where a run differs from that of a single process: other batches, or losses by more than they are rounded."""
    assert len(together) == len(alone) == 3 * EPOCHS
    assert {row["workers"] for row in together} == {str(num_workers)}
    for mine, theirs in zip(alone, together, strict=True):
        for column in ("step", "epoch", "update", "images", "batch_crc", "lr"):
            assert theirs[column] == mine[column], column
        for column in LOSSES:
            assert float(theirs[column]) == pytest.approx(float(mine[column]), rel=1e-6), (column, mine["step"])


def cmdline(pid: int) -> list[str]:
    """The words that a process was started with; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return []


def workers(lab: Lab, job: list[str]) -> dict[str, list[int]]:
    """Host -> process ids of the workers there whose words begin with ``job``; a shell or launcher that has them among its own is none."""
    argv = [*HOROYOLO, *job]
    return {host: [pid for pid in lab.processes(host) if cmdline(pid)[: len(argv)] == argv] for host in lab.hosts}


def wait_until(condition: Callable[[], object], process: HostProcess | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until a condition holds; fail when it takes longer, or when ``process`` ends before."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0][-3000:] if process.stdout else "it has ended"
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)
