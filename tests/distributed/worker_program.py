"""What each Horovod worker of the tests does; it saves what it saw, and the tests judge."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from horoyolo.compression.dense import Dense
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.distributed.comm import Comm, broadcast_tensors, open_comm
from horoyolo.distributed.exchange import Exchange
from horoyolo.distributed.syncbn import average_bn_buffers, convert_sync_bn

GLOBAL_BATCH = 3  # four workers: one has no image
BUCKET_MB = 0.002


def conv_net(channels_last: bool = False) -> nn.Module:
    """Strided 3x3 convolutions with an unused parameter and a frozen one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.SiLU(), nn.Conv2d(8, 16, 3, 2), nn.SiLU(), nn.Conv2d(16, 4, 1))
    model.register_parameter("unused", nn.Parameter(torch.ones(5)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    return model.to(memory_format=torch.channels_last) if channels_last else model


def bn_net() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-3, momentum=0.03), nn.SiLU(), nn.BatchNorm2d(6))
    for bn in (model[1], model[3]):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
    return model


def batches(seed: int = 2) -> tuple[Tensor, Tensor]:
    """The images of a global batch, far from zero mean, and a weight for each output that makes the loss depend on all of it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(GLOBAL_BATCH, 3, 12, 12, generator=generator) * 3 + 50
    return images, torch.randn(GLOBAL_BATCH, 6, 10, 10, generator=generator)


def share(rank: int, size: int) -> slice:
    """The images of one worker: contiguous, the first workers get one more."""
    each, more = divmod(GLOBAL_BATCH, size)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def nices() -> dict[str, Any]:
    """The niceness of this thread, and of every one of the process."""
    tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    return {"own": os.getpriority(os.PRIO_PROCESS, 0), "all": sorted(os.getpriority(os.PRIO_PROCESS, task) for task in tasks)}


def exchanged_gradients(comm: Comm, channels_last: bool, micro_batches: int, overlap: bool = True) -> dict[str, Any]:
    """Gradients of this worker's share before and after an exchange, over two updates; a worker without images skips backward."""
    model = conv_net(channels_last)
    images = batches()[0][share(comm.rank(), comm.size())]
    reference = copy.deepcopy(model)
    for _ in range(micro_batches):
        reference(images).square().sum().backward()
    exchange = Exchange(model.named_parameters(), ErrorFeedback(Dense(), overlap), comm, BUCKET_MB)
    sums = []
    for _ in range(2):
        exchange.zero_grad()
        for micro in range(micro_batches):
            if micro == micro_batches - 1:
                exchange.arm()
                armed = nices()
            if len(images):
                model(images).square().sum().backward()
        stats = exchange.finish()
        sums.append({name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None})
    zeros = {name: torch.zeros_like(param) for name, param in model.named_parameters() if param.requires_grad}
    own = {name: param.grad for name, param in reference.named_parameters() if param.grad is not None and len(images)}
    return {"own": {**zeros, **own}, "sums": sums, "wire_bytes": stats.wire_bytes, "num_buckets": len(exchange.buckets), "nices": armed}


def synchronised_bn(comm: Comm, channels_last: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One training pass through SyncBatchNorm layers on this worker's share."""
    model = convert_sync_bn(bn_net(), comm)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images, weights = (tensor[share(comm.rank(), comm.size())].to(memory_format=memory_format) for tensor in batches())
    images.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        outputs = model(images)
    (outputs.float() * weights).sum().backward()
    return {
        "outputs": outputs.detach().float(),
        "image_grads": images.grad,
        "weight_grads": {name: param.grad for name, param in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def collectives(comm: Comm) -> dict[str, Any]:
    """One of each."""
    rank, size = comm.rank(), comm.size()
    results: dict[str, Any] = {"rank": rank, "size": size, "local": (comm.local_rank(), comm.local_size())}
    results["sum"] = comm.allreduce(torch.full((2, 3, 2, 2), rank + 1.0).to(memory_format=torch.channels_last))
    results["max"] = comm.allreduce(torch.tensor([rank, -rank]), "max")
    results["rows"] = {
        str(dtype): comm.allgather(torch.full((rank, 2), rank).to(dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.bool, torch.int64)
    }
    results["no_rows"] = comm.allgather(torch.zeros(0, 4))
    results["alltoall"] = comm.alltoall(torch.arange(size * (size + 1) // 2) + 100 * rank, list(range(1, size + 1)))
    results["broadcast"] = [comm.broadcast(torch.full((2, 2), rank).to(dtype), root=size - 1) for dtype in (torch.bfloat16, torch.int8)]
    channels_last = torch.full((1, 2, 2, 2), float(rank)).to(memory_format=torch.channels_last)
    tensors = [torch.full((2,), float(rank)), torch.tensor(rank), channels_last]
    broadcast_tensors(tensors, comm, root=size - 1)
    results["broadcast_tensors"] = tensors
    results["broadcast_object"] = comm.broadcast_object({"from": rank}, root=size - 1)
    results["objects"] = comm.allgather_object(["x" * rank])
    handles = [comm.allreduce_async(torch.full((3,), float(index)), f"async.{index}") for index in range(3)]
    results["async"] = [handle.wait() for handle in reversed(handles)]
    try:
        comm.allreduce(torch.zeros(rank + 1))
    except RuntimeError as error:
        results["out_of_step"] = str(error)
    bn = nn.BatchNorm2d(2)
    bn.running_mean.fill_(float(rank))
    average_bn_buffers(bn, comm)
    results["averaged_mean"] = bn.running_mean
    comm.barrier()
    return results


def main(out: Path) -> None:
    comm = open_comm()
    torch.save(
        {
            "comm": collectives(comm),
            "plain": exchanged_gradients(comm, channels_last=False, micro_batches=1),
            "channels_last": exchanged_gradients(comm, channels_last=True, micro_batches=1),
            "accumulated": exchanged_gradients(comm, channels_last=True, micro_batches=3),
            "after_backward": exchanged_gradients(comm, channels_last=False, micro_batches=1, overlap=False),
            "bn": synchronised_bn(comm, channels_last=False),
            "bn_channels_last": synchronised_bn(comm, channels_last=True),
            "bn_bfloat16": synchronised_bn(comm, channels_last=True, dtype=torch.bfloat16),
        },
        out / f"rank{comm.rank()}.pt",
    )
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
