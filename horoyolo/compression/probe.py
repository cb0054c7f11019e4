"""What a job's network and each way to sum cost on its machines, measured by its workers while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Lossy, ring_bytes
from horoyolo.compression.topk import BLOCK

PROBE_BYTES, MOST_PROBE_BYTES = 1 << 20, 1 << 24
CLEAR = 4  # times the latency that a probe of the bandwidth takes, unless its bytes are the most: latencies vary by Horovod's cycle


@dataclass(frozen=True)
class Link:
    """What a worker's network does for it."""

    latency_s: float  # of the smallest allreduce
    ring_bytes_per_s: float  # sent by one worker in a large allreduce
    alltoall_bytes_per_s: float  # sent by one worker in a large alltoall: less, where the workers of a host share its way to others
    probe_s: float = 0.0  # what it took to find out

    def time_s(self, wire_bytes: int, alltoall_bytes: int = 0) -> float:
        """What an exchange takes in which each worker sends so many bytes, ``alltoall_bytes`` of them straight to their receivers."""
        return self.latency_s + (wire_bytes - alltoall_bytes) / self.ring_bytes_per_s + alltoall_bytes / self.alltoall_bytes_per_s


@dataclass(frozen=True)
class Cost:
    """What a way to sum takes of an update, apart from the link."""

    codec_s: float  # encoding and decoding
    wire_bytes: int  # sent by a worker
    alltoall_bytes: int  # of these, what goes straight to its receivers instead of around a ring


def agreed(figures: list[float], comm: Comm) -> list[float]:
    """The largest of each figure over workers: a step is as slow as its slowest worker."""
    return comm.allreduce_async(torch.tensor(figures, dtype=torch.float64), "probe.agreed", "max").wait().tolist()


def probe_link(comm: Comm, device: torch.device) -> Link:
    """Latency and bandwidths between the workers as they are now, from memory of ``device``: GPUs may have links of their own."""
    started_s = time.perf_counter()
    latency_s = agreed([min(_allreduce_s(comm, torch.zeros(1, device=device)) for _ in range(5))], comm)[0]
    num_bytes, large_s = PROBE_BYTES // 4, 0.0
    while large_s < CLEAR * latency_s and num_bytes < MOST_PROBE_BYTES:
        num_bytes *= 4
        large_s = agreed([min(_allreduce_s(comm, torch.zeros(num_bytes // 4, device=device)) for _ in range(3))], comm)[0]
    part_bytes = num_bytes // comm.size()
    parts_s = agreed([min(_alltoall_s(comm, part_bytes // 4, device) for _ in range(3))], comm)[0]
    probe_s = agreed([time.perf_counter() - started_s], comm)[0]
    ring_s, alltoall_s = max(large_s - latency_s, 1e-6), max(parts_s - latency_s, 1e-6)
    return Link(latency_s, ring_bytes(num_bytes, comm.size()) / ring_s, (comm.size() - 1) * part_bytes / alltoall_s, probe_s)


def _allreduce_s(comm: Comm, tensor: Tensor) -> float:
    started_s = time.perf_counter()
    comm.allreduce_async(tensor, f"probe.{tensor.numel()}").wait()
    return time.perf_counter() - started_s


def _alltoall_s(comm: Comm, part: int, device: torch.device) -> float:
    """What an alltoall takes in which every worker has ``part`` numbers for each."""
    tensor = torch.zeros(comm.size() * part, device=device)
    started_s = time.perf_counter()
    comm.alltoall_async(tensor, [part] * comm.size(), "probe.alltoall").wait()
    return time.perf_counter() - started_s


def probe_costs(makers: Mapping[str, Callable[[], Lossy]], buckets: list[Bucket], comm: Comm) -> dict[str, Cost]:
    """What each way to sum takes of an update of these buckets, without the network: the most of any worker, the same on all."""
    costs = [measure_cost(make(), buckets, EchoComm(comm.size())) for make in makers.values()]
    most = iter(agreed([float(figure) for cost in costs for figure in astuple(cost)], comm))
    return {name: Cost(next(most), int(next(most)), int(next(most))) for name in makers}


def measure_cost(lossy: Lossy, buckets: list[Bucket], comm: EchoComm) -> Cost:
    """The time and the bytes of an update of copies of these buckets, with a ``comm`` that takes no time.

    Of two updates after the first: the quicker time, the mean bytes.
    """
    copies = [_Copy(bucket, comm.size()) for bucket in buckets]
    residuals = [torch.empty_like(copy.flat) for copy in copies]
    times_s, wire_bytes, alltoall_bytes = [], [], []
    for _ in range(3):
        for bucket, copy in zip(buckets, copies, strict=True):
            copy.flat[: bucket.flat.numel()] = bucket.flat
        alltoall_before = comm.alltoall_bytes
        started_s = time.perf_counter()
        pending = [lossy.start(copy, comm, residual) for copy, residual in zip(copies, residuals, strict=True)]
        for each in pending:
            each.proceed()
        wire_bytes.append(sum(each.finish() for each in pending))
        if copies and copies[0].flat.is_cuda:
            torch.cuda.synchronize(copies[0].flat.device)
        times_s.append(time.perf_counter() - started_s)
        alltoall_bytes.append(comm.alltoall_bytes - alltoall_before)
        lossy.commit()
    return Cost(0.0 if lossy.exact else min(times_s[1:]), sum(wire_bytes[1:]) // 2, sum(alltoall_bytes[1:]) // 2)


class _Copy:
    """A bucket with memory of its own, and longer by a block for each worker: where parts differ there are zeros then, which nobody selects."""

    def __init__(self, bucket: Bucket, size: int):
        self.name, self.params = bucket.name, bucket.params
        self.flat = bucket.flat.new_zeros(bucket.flat.numel() + BLOCK * size)
        self.grads = [self.flat.as_strided(grad.shape, grad.stride(), grad.storage_offset()) for grad in bucket.grads]


class EchoComm:
    """The first of ``size`` workers that all give the same, at once: what is left of a collective without its network."""

    def __init__(self, size: int):
        self._size = size
        self.alltoall_bytes = 0  # sent to others by all alltoalls so far

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size

    def allreduce_async(self, tensor: Tensor, name: str, op: str = "sum") -> _Echo:
        return _Echo(tensor)

    def allgather_async(self, tensor: Tensor, name: str) -> _Echo:
        return _Echo(torch.cat([tensor] * self._size))

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> _Echo:
        self.alltoall_bytes += sum(splits[1:]) * tensor[:1].nbytes
        return _Echo((tensor, list(splits)))  # from each what it was sent: workers send themselves nothing


@dataclass(frozen=True)
class _Echo:
    result: Any

    def wait(self) -> Any:
        return self.result
