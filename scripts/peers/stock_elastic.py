"""The peer that recovery is measured against: the same step under Horovod's own elastic run, with ``TorchState`` and a commit every step.

    horovodrun -np 3 --min-np 1 --max-np 3 --host-discovery-script hosts.sh --gloo python scripts/peers/stock_elastic.py --record steps.csv

Every worker adds a row for each step that it has completed: ``step,rank,size,host,pid,norm`` (the norm of its weights, where that was asked for).
``--commit-every 0`` is the same loop without any elastic part, to see what that costs.
"""

from __future__ import annotations

import argparse
import os
import platform

import horovod.torch as hvd
import torch

from horoyolo.bench.record import RowFile
from horoyolo.bench.step import VARIANTS, Stepper
from horoyolo.engine.device import Numerics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", required=True, metavar="FILE", help="where rows go; a file that all hosts see")
    parser.add_argument("--cfg", default="yolov5n")
    parser.add_argument("--img", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a step of each worker")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--commit-every", type=int, default=1, metavar="STEPS", help="0: not elastic")
    parser.add_argument("--norms", action="store_true", help="record the norm of the weights; at a learning rate above 0")
    parsed = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)
    stepper = Stepper(Numerics(torch.device("cpu"), *VARIANTS["fp32 NCHW"]), parsed.cfg, parsed.img, parsed.batch, seed=hvd.rank())
    stepper.optimizer = hvd.DistributedOptimizer(stepper.optimizer, named_parameters=stepper.model.named_parameters(), op=hvd.Sum)
    rows = RowFile(parsed.record)

    def steps_from(step: int):
        for number in range(step + 1, parsed.steps + 1):
            stepper.step()
            norm = float(sum(param.detach().norm() for param in stepper.model.parameters())) if parsed.norms else 0.0
            rows.add(number, hvd.rank(), hvd.size(), platform.node(), os.getpid(), norm)
            yield number

    if parsed.commit_every:

        @hvd.elastic.run
        def train(state: hvd.elastic.TorchState) -> None:
            for number in steps_from(state.step):
                state.step = number
                if number % parsed.commit_every == 0:
                    state.commit()

        train(hvd.elastic.TorchState(model=stepper.model, optimizer=stepper.optimizer, step=0))
    else:
        hvd.broadcast_parameters(stepper.model.state_dict(), root_rank=0)
        for _ in steps_from(0):
            pass
    hvd.shutdown()


if __name__ == "__main__":
    main()
