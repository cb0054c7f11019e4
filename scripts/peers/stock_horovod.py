"""The peer that the exchange is measured against: the same step through Horovod's own ``DistributedOptimizer``.

    horovodrun -np 2 --gloo python scripts/peers/stock_horovod.py --cfg yolov5s --img 320 --batch 4 --steps 20

NCHW only: ``DistributedOptimizer`` refuses the gradients of channels_last models. The first worker prints the median time of a step in seconds.
"""

from __future__ import annotations

import argparse
import statistics

import horovod.torch as hvd
import torch

from horoyolo.bench.step import VARIANTS, WARMUP_STEPS, Stepper
from horoyolo.engine.device import Numerics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", default="yolov5s")
    parser.add_argument("--img", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a step of each worker")
    parser.add_argument("--steps", type=int, default=20)
    parsed = parser.parse_args()

    hvd.init()
    stepper = Stepper(Numerics(torch.device("cpu"), *VARIANTS["bf16 NCHW"]), parsed.cfg, parsed.img, parsed.batch, seed=hvd.rank())
    stepper.optimizer = hvd.DistributedOptimizer(stepper.optimizer, named_parameters=stepper.model.named_parameters(), op=hvd.Sum)
    hvd.broadcast_parameters(stepper.model.state_dict(), root_rank=0)
    stepper.seconds(WARMUP_STEPS)
    times = stepper.seconds(parsed.steps)
    if hvd.rank() == 0:
        print(f"median_step_s={statistics.median(times):.6f}", flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
