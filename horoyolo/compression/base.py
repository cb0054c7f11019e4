"""What every way of summing gradients over workers has in common.

A compressor turns a bucket of this worker's gradients into the sum over workers, in place and in two halves, so that other work fits
between: ``start`` sends (and may first encode), ``finish`` waits (and may decode, or run a second round). Its laws: the result has the same
bits on every worker; it depends on the values and on the number of workers alone, not on timing; ``finish`` says how many bytes this worker
sent.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor, nn


class Bucket(Protocol):
    """The part of ``distributed.buckets.Bucket`` that compressors use."""

    @property
    def name(self) -> str: ...
    @property
    def flat(self) -> Tensor: ...  # (numel,) float32
    @property
    def params(self) -> list[tuple[str, nn.Parameter]]: ...
    @property
    def grads(self) -> list[Tensor]: ...  # views into flat


class Comm(Protocol):
    """The part of ``distributed.comm.Comm`` that compressors use."""

    def size(self) -> int: ...
    def allreduce_async(self, tensor: Tensor, name: str, op: Literal["sum", "max"] = "sum") -> Any: ...


class Pending(Protocol):
    """A bucket under way."""

    def finish(self) -> int:
        """Return when the bucket holds the sum over workers; gives the bytes that this worker sent."""


class Compressor(Protocol):
    """Sums buckets over workers."""

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        """Begin to replace ``bucket.flat`` by its sum over workers."""
