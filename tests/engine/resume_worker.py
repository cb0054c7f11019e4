"""One of two workers that train without a stop, and again with one and a resume, with each compression; what it ends with goes to ``rankN.pt``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small_run import build_job

from horoyolo.data.synthetic import write_synthetic
from horoyolo.distributed.comm import Comm, open_comm
from horoyolo.engine.build import Training
from horoyolo.engine.commit import copied, local_state
from horoyolo.engine.hooks import Hook
from horoyolo.engine.stop import StopRequest
from horoyolo.engine.train import Outcome, train, watched
from horoyolo.engine.watch import WriteLedger

COMPRESSIONS = ("none", "fp16", "bf16", "int8", "onebit", "topk", "powersgd")
EPOCHS, STEPS = 2, 8


class StopAt(StopRequest):
    """A request that comes to one worker before a step; never for None."""

    def __init__(self, job: Training, step: int | None) -> None:
        super().__init__()
        self._job, self._step = job, step

    @property
    def pending(self) -> bool:
        return self._job.progress.step + 1 == self._step and self._job.comm.rank() == 1


def run(data: Path, project: Path, comm: Comm, name: str, compression: str, stop_at: int | None) -> tuple[bool, dict[str, Any]]:
    """Trains until done or stopped; whether it was done, and this worker's state."""
    values = {"name": name, "epochs": EPOCHS, "comms.compression": compression, "comms.warmup_updates": 2}
    job = build_job(data, project, comm, **values)
    hooks: list[Hook] = [WriteLedger(job)]
    with watched(job, hooks):
        outcome = train(job, hooks, StopAt(job, stop_at))
    return outcome is Outcome.DONE, copied(local_state(job))


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    comm = open_comm()
    data = out / "data" / "data.yaml"
    if comm.rank() == 0:
        write_synthetic(out / "data", 10, seed=0)
    comm.barrier()
    found: dict[str, Any] = {}
    for number, compression in enumerate(COMPRESSIONS):
        stop_at = 1 + number % (STEPS - 1)
        _, whole = run(data, out, comm, f"{compression}-whole", compression, None)
        stopped, _ = run(data, out, comm, compression, compression, stop_at)
        done, resumed = run(data, out, comm, compression, compression, None)
        found[compression] = {"stopped": stopped, "done": done, "whole": whole, "resumed": resumed}
    torch.save(found, out / f"rank{comm.rank()}.pt")
    comm.barrier()
    comm.close()


if __name__ == "__main__":
    main()
