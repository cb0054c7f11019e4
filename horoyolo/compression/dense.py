"""Gradients as they are: one allreduce of floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Lossy, Pending, ring_bytes


class Dense(Lossy):
    """Sums each bucket with one allreduce in place, and leaves nothing out."""

    @property
    def exact(self) -> bool:
        return True

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> Pending:
        """Hand the bucket to the network as it is."""
        wire_bytes = ring_bytes(bucket.flat.numel() * bucket.flat.element_size(), comm.size())
        return _DensePending(comm.allreduce_async(bucket.flat, bucket.name), wire_bytes)


class WideGrads(Protocol):
    """The part of ``distributed.exact.WideGrads`` that is used here."""

    def of(self, param: Tensor) -> Tensor: ...
    def clear(self) -> None: ...


class ExactSum(Dense):
    """Sums gradients that were added up in float64: twice the bytes, and the same bits at any number of workers (``distributed.exact``)."""

    def __init__(self, wide_grads: WideGrads):
        super().__init__()
        self._wide_grads = wide_grads

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> Pending:
        """Send the float64 sums of the bucket's gradients, with what is in the bucket: zeros, or what a lossy way to sum has left out before."""
        sums = [self._wide_grads.of(param) for _, param in bucket.params]
        flat = torch.cat([wide.as_strided((wide.numel(),), (1,)) for wide in sums])
        torch._foreach_zero_(sums)
        flat.add_(bucket.flat)
        wire_bytes = ring_bytes(flat.numel() * flat.element_size(), comm.size())
        return _ExactPending(bucket, comm.allreduce_async(flat, bucket.name), wire_bytes)

    def reset(self) -> None:
        super().reset()
        self._wide_grads.clear()


@dataclass(frozen=True)
class _ExactPending:
    bucket: Bucket
    handle: Any
    wire_bytes: int

    def proceed(self) -> None:
        pass

    def finish(self) -> int:
        self.bucket.flat.copy_(self.handle.wait())
        return self.wire_bytes


@dataclass(frozen=True)
class _DensePending:
    handle: Any
    wire_bytes: int

    def proceed(self) -> None:
        pass

    def finish(self) -> int:
        self.handle.wait()
        return self.wire_bytes
