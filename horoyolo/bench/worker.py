"""One process of ``bench scaling``: takes training steps and reports their median time.

Started by horovodrun or mpirun it exchanges every step; started beside others, with ``--alone``, ``--in-step`` or ``--sockets``, it never
initialises Horovod, and exchanges nothing, waits for the others, or exchanges as many bytes over plain sockets.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from horoyolo.bench.ring import SocketRing
from horoyolo.bench.step import VARIANTS, WARMUP_STEPS, Stepper
from horoyolo.bench.talk import Starter, report
from horoyolo.compression.build import build_compressor
from horoyolo.compression.policy import ROUNDS
from horoyolo.config import Comms, Config
from horoyolo.distributed.comm import open_comm
from horoyolo.distributed.exchange import Exchange
from horoyolo.engine.build import overlaps
from horoyolo.engine.device import Numerics, cycle_time_ms


class AfterBackward:
    """An exchange that does all it does when backward is over, in its ``finish``."""

    def arm(self) -> None:
        pass

    def measure(self) -> None:
        pass


class WaitForAll(AfterBackward):
    """Moves nothing, but waits for all before the optimizer: a step takes as long as the slowest worker's, and that is what an exchange adds to."""

    def __init__(self, starter: Starter):
        self._starter = starter

    def finish(self) -> None:
        self._starter.allgather(None)


class SocketExchange(AfterBackward):
    """Moves as many bytes as the gradients have and adds them up, in the same place of a step; the gradients themselves stay where they are.

    No exchange of gradients can be quicker with sockets like these: it would have to gather and spread them too.
    """

    def __init__(self, ring: SocketRing, model: torch.nn.Module):
        self._ring = ring
        self._values = np.zeros(sum(param.numel() for param in model.parameters()), np.float32)
        self._values.fill(0.0)  # memory that is there before the clock runs

    def finish(self) -> None:
        self._ring.allreduce(self._values)


def main() -> None:
    """Parses the words that ``bench scaling`` gives its workers, and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True)
    parser.add_argument("--img", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--in-step", action="store_true")
    parser.add_argument("--sockets", action="store_true")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    if parsed.alone or parsed.in_step or parsed.sockets:
        step_beside_others(parsed, Starter())
    else:
        step_together(parsed)


def step_beside_others(parsed: argparse.Namespace, starter: Starter) -> None:
    """Measures steps without Horovod."""
    stepper = _stepper(parsed, starter.rank)
    if parsed.in_step:
        stepper.exchange = WaitForAll(starter)
    elif parsed.sockets:
        stepper.exchange = SocketExchange(SocketRing(starter), stepper.model)
    stepper.seconds(WARMUP_STEPS)
    measured = stepper.measure(parsed.steps, lambda: starter.allgather(None))
    report({**measured, "gradient_bytes": 4 * sum(param.numel() for param in stepper.model.parameters())})


def step_together(parsed: argparse.Namespace) -> None:
    """Measures steps as training takes them."""
    comm = open_comm(cycle_time_ms(Config(device="cpu")))
    stepper = _stepper(parsed, comm.rank())
    comms = Comms()
    choices = overlaps(comms, stepper.numerics)
    stepper.exchange = Exchange(stepper.model.named_parameters(), build_compressor(comms, choices), comm, comms.bucket_mb)
    stepper.seconds(WARMUP_STEPS + (ROUNDS * len(choices) if len(choices) > 1 else 0))  # where there is a choice it is made by then
    measured = stepper.measure(parsed.steps, comm.barrier)
    if comm.rank() == 0:
        report(measured)
    comm.barrier()
    comm.close()


def _stepper(parsed: argparse.Namespace, seed: int) -> Stepper:
    return Stepper(Numerics(torch.device("cpu"), *VARIANTS[parsed.variant]), parsed.cfg, parsed.img, parsed.batch, seed)


if __name__ == "__main__":
    main()
