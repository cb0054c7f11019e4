"""One process of ``bench scaling``: takes training steps and prints their median time in seconds on standard output.

Started alone it never initialises Horovod and exchanges nothing; started by horovodrun or mpirun it exchanges every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

import torch

from horoyolo.bench.step import VARIANTS, WARMUP_STEPS, Stepper
from horoyolo.compression.build import build_compressor
from horoyolo.config import Comms, Config
from horoyolo.distributed.comm import open_comm
from horoyolo.distributed.exchange import Exchange
from horoyolo.engine.build import overlaps
from horoyolo.engine.device import Numerics
from horoyolo.engine.start import cycle_time_ms


def main() -> None:
    """Parses the words that ``bench scaling`` gives its workers, and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True)
    parser.add_argument("--img", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--wait", action="store_true", help="say `ready` when warm, and start at a line on standard input")
    parsed = parser.parse_args()

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    comm = open_comm(cycle_time_ms(Config()))
    numerics = Numerics(torch.device("cpu"), *VARIANTS[parsed.variant])
    stepper = Stepper(numerics, parsed.cfg, parsed.img, parsed.batch, seed=comm.rank())
    if comm.size() > 1:
        comms = Comms()
        compressor = build_compressor(comms)
        stepper.exchange = Exchange(stepper.model.named_parameters(), compressor, comm, comms.bucket_mb, overlaps(comms, numerics))
    stepper.seconds(WARMUP_STEPS)
    if parsed.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    times = stepper.seconds(parsed.steps)
    if comm.rank() == 0:
        print(f"median_step_s={statistics.median(times):.6f}", flush=True)
    comm.barrier()
    comm.close()


if __name__ == "__main__":
    main()
