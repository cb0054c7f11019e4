"""One of two workers that go on where one worker was stopped; and one of them, by itself, where both were. Losses of each step go to ``rankN.pt``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from resume_worker import StopAt
from small_run import build_job

from horoyolo.data.synthetic import write_synthetic
from horoyolo.distributed.comm import Comm, LocalComm, open_comm
from horoyolo.engine.hooks import Hook, StepRecord
from horoyolo.engine.train import train, watched
from horoyolo.engine.watch import WriteLedger

STOP_AT, STEPS_AFTER = 5, 31


class Collect(Hook):
    """Losses by step."""

    def __init__(self) -> None:
        self.losses: dict[int, list[float]] = {}

    def after_step(self, record: StepRecord, batch: Any) -> None:
        self.losses[record.step] = [record.box_loss, record.obj_loss, record.cls_loss]


class StopEveryone(StopAt):
    """A request that each worker hears, be it alone or not."""

    @property
    def pending(self) -> bool:
        return self._job.progress.step + 1 == self._step


def run(out: Path, comm: Comm, name: str, stop_at: int | None) -> dict[int, list[float]]:
    """Trains, from where ``name`` stood, until done or stopped."""
    # YOLOv5's own rates but the warm-up's, so that 30 steps learn something; batches of 3, 3 and 2 images.
    job = build_job(out / "data" / "data.yaml", out, comm, name=name, batch=3, epochs=12, **{"comms.sync_bn": True, "hyp.warmup_epochs": 0})
    collect = Collect()
    hooks: list[Hook] = [WriteLedger(job), collect]
    with watched(job, hooks):
        train(job, hooks, StopEveryone(job, stop_at))
    return collect.losses


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    comm, alone = open_comm(), LocalComm()
    if comm.rank() == 0:
        write_synthetic(out / "data", 10, seed=0)
    comm.barrier()
    found: dict[str, dict[int, list[float]]] = {}
    if comm.rank() == 0:
        found["whole"] = run(out, alone, "whole", None)
        run(out, alone, "one then two", STOP_AT)
    comm.barrier()
    found["one then two"] = run(out, comm, "one then two", None)
    run(out, comm, "two then one", STOP_AT)
    if comm.rank() == 0:
        found["two then one"] = run(out, alone, "two then one", None)
    torch.save(found, out / f"rank{comm.rank()}.pt")
    comm.barrier()
    comm.close()


if __name__ == "__main__":
    main()
