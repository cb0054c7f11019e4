"""A worker of two generations, in which sums are asked for at the same time: ``fusion_worker.py OUT WORKER PORT PORT`` saves them as ``rankN.pt``.

Workers 0 and 1 are in both generations; the last one comes to the second.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from horoyolo.distributed.comm import HorovodComm, import_horovod
from horoyolo.elastic.state import set_one_of_two

SIZES = (2, 3)
LENGTHS = (300_000, 200_000, 1_000, 70)  # of the sums of a step: 1.2 MB and less
CYCLE_MS = 20.0


def join(worker: int, size: int, port: str) -> HorovodComm:
    numbers = {"RANK": worker, "SIZE": size, "LOCAL_RANK": worker, "LOCAL_SIZE": size, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    os.environ.update({f"HOROVOD_{name}": str(value) for name, value in numbers.items()})
    os.environ.update({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": port, "HOROVOD_GLOO_IFACE": "lo"})
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"  # as the launcher gives it to every generation
    hvd = import_horovod(size)
    set_one_of_two(os.environ, CYCLE_MS)
    hvd.init()
    return HorovodComm(hvd)


def sums(comm: HorovodComm, together: bool) -> list[Any]:
    draws = torch.Generator().manual_seed(comm.rank())
    values = [torch.randn(length, generator=draws) for length in LENGTHS]
    comm.barrier()
    if together:
        return [handle.wait() for handle in [comm.allreduce_async(value, f"sum.{index}") for index, value in enumerate(values)]]
    return [comm.allreduce(value, name=f"sum.{index}") for index, value in enumerate(values)]


def main(out: str, worker: int, ports: list[str]) -> None:
    seen = []
    for size, port in zip(SIZES, ports, strict=True):
        if worker < size:
            comm = join(worker, size, port)
            seen.append([sums(comm, together) for together in (False, True, True, True)])
            gathered = [comm.allgather_async(torch.full((worker + 1, length), worker), f"rows.{length}") for length in LENGTHS]
            assert [len(handle.wait()) for handle in gathered] == [size * (size + 1) // 2] * len(LENGTHS)
            comm.close()
    torch.save(seen, f"{out}/rank{worker}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
