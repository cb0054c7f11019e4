"""The peer that compressed exchanges are measured against: the same step through PyTorch's DistributedDataParallel over Gloo, with its hooks.

Started side by side by ``horoyolo bench compression --peers``, which says who is where. DDP averages where the others add up, which takes as long.
PowerSGD as PyTorch advises: warm start and error feedback on. Its hook refuses the gradients of channels_last models.
"""

from __future__ import annotations

import argparse
import os
import socket

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from horoyolo.bench.step import VARIANTS, WARMUP_STEPS, Stepper, variant_name
from horoyolo.bench.talk import Starter, report
from horoyolo.engine.device import Numerics

START_POWERSGD = 2  # the first iteration that DDP allows
# One bucket for all: its hook begins the second round of a bucket from another thread than the next bucket's first, and Gloo, which pairs
# collectives by their order, then meets different ones on different processes and aborts.
POWERSGD_BUCKET_MB = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", default="yolov5s")
    parser.add_argument("--img", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a step of each worker")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--layout", default="channels_last", choices=("channels_last", "NCHW"))
    parser.add_argument("--hook", default="none", choices=("none", "fp16", "powersgd"))
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD's matrices")
    parser.add_argument("--nic", default="", help="the interface between hosts; what it sends is counted")
    parsed = parser.parse_args()

    starter = Starter()
    torch.set_num_threads(1)
    join_group(starter, parsed.nic)
    numerics = Numerics(torch.device("cpu"), *VARIANTS[variant_name(parsed.precision, parsed.layout)])
    stepper = Stepper(numerics, parsed.cfg, parsed.img, parsed.batch, seed=starter.rank)
    bucket_mb = POWERSGD_BUCKET_MB if parsed.hook == "powersgd" else None
    model = DistributedDataParallel(stepper.model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
    if parsed.hook == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif parsed.hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None,
            matrix_approximation_rank=parsed.rank,
            start_powerSGD_iter=START_POWERSGD,
            use_error_feedback=True,
            warm_start=True,
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    stepper.model = model
    stepper.seconds(START_POWERSGD + WARMUP_STEPS)
    measured = stepper.measure(parsed.steps, lambda: starter.allgather(None), parsed.nic)
    dist.destroy_process_group()
    report(measured)


def join_group(starter: Starter, nic: str) -> None:
    """Meets the others at the first process, on a port that is free there."""
    if starter.rank == 0:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
    port = starter.allgather(port if starter.rank == 0 else None)[0]
    os.environ.update(MASTER_ADDR=starter.hosts[0], MASTER_PORT=str(port), GLOO_SOCKET_IFNAME=nic or "lo")
    dist.init_process_group("gloo", rank=starter.rank, world_size=len(starter.hosts))


if __name__ == "__main__":
    main()
