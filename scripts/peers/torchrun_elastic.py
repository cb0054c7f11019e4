"""The peer that recovery is measured against: the same step through DistributedDataParallel under torchrun, which restarts all when one dies.

    torchrun --nnodes 1:3 --nproc-per-node 1 --max-restarts 100 --rdzv-backend c10d --rdzv-endpoint HOST:PORT
             scripts/peers/torchrun_elastic.py --record steps.csv --snapshot state.pt                            (on every host)

As torchrun's own examples do, the first worker writes a snapshot from time to time, and everybody starts from it. Rows are those of
``stock_elastic.py``.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from horoyolo.bench.record import RowFile
from horoyolo.bench.step import VARIANTS, Stepper
from horoyolo.engine.device import Numerics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", required=True, metavar="FILE", help="where rows go; a file that all hosts see")
    parser.add_argument("--snapshot", required=True, type=Path, metavar="FILE", help="likewise")
    parser.add_argument("--cfg", default="yolov5n")
    parser.add_argument("--img", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a step of each worker")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--snapshot-every", type=int, default=10, metavar="STEPS")
    parsed = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stepper = Stepper(Numerics(torch.device("cpu"), *VARIANTS["fp32 NCHW"]), parsed.cfg, parsed.img, parsed.batch, seed=rank)
    model, step = stepper.model, 0
    if parsed.snapshot.exists():
        snapshot = torch.load(parsed.snapshot)
        model.load_state_dict(snapshot["model"])
        stepper.optimizer.load_state_dict(snapshot["optimizer"])
        step = snapshot["step"]
    stepper.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    rows = RowFile(parsed.record)
    for number in range(step + 1, parsed.steps + 1):
        stepper.step()
        rows.add(number, rank, dist.get_world_size(), platform.node(), os.getpid(), 0.0)
        if rank == 0 and number % parsed.snapshot_every == 0:
            partial = parsed.snapshot.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": stepper.optimizer.state_dict(), "step": number}, partial)
            partial.replace(parsed.snapshot)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
