"""The peer that the exchange is measured against: the same step through Horovod's own ``DistributedOptimizer``.

    horovodrun -np 2 --gloo python scripts/peers/stock_horovod.py --cfg yolov5s --img 320 --batch 4 --steps 20

NCHW only: ``DistributedOptimizer`` refuses the gradients of channels_last models. The first worker reports the median time of a step in seconds
and, with ``--nic``, the bytes that its host sent for each.
"""

from __future__ import annotations

import argparse

import horovod.torch as hvd
import torch

from horoyolo.bench.step import VARIANTS, WARMUP_STEPS, Stepper, variant_name
from horoyolo.bench.talk import report
from horoyolo.engine.device import Numerics

COMPRESSIONS = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", default="yolov5s")
    parser.add_argument("--img", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a step of each worker")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--compression", default="none", choices=COMPRESSIONS)
    parser.add_argument("--nic", default="", help="count what this interface sends")
    parsed = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)
    numerics = Numerics(torch.device("cpu"), *VARIANTS[variant_name(parsed.precision, "NCHW")])
    stepper = Stepper(numerics, parsed.cfg, parsed.img, parsed.batch, seed=hvd.rank())
    stepper.optimizer = hvd.DistributedOptimizer(
        stepper.optimizer,
        named_parameters=stepper.model.named_parameters(),
        compression=COMPRESSIONS[parsed.compression],
        op=hvd.Sum,
    )
    hvd.broadcast_parameters(stepper.model.state_dict(), root_rank=0)
    stepper.seconds(WARMUP_STEPS)
    measured = stepper.measure(parsed.steps, hvd.barrier, parsed.nic)
    if hvd.rank() == 0:
        report(measured)
    hvd.shutdown()


if __name__ == "__main__":
    main()
