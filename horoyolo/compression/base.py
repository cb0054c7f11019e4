"""What every way of summing gradients over workers has in common.

A compressor turns a bucket of this worker's gradients into the sum over workers, in place and in steps, so that other work fits between:
``start`` encodes and sends, ``proceed`` begins the second round of those that have one, ``finish`` waits and decodes. Its laws, which tests
state over every entry of the table:

- The result has the same bits on every worker, and depends on values, settings and the number of workers alone, not on timing.
- Over all workers, gradients + old residuals = result + sum of new residuals, but for rounding: what was not sent is kept, not lost.
- ``finish`` says how many bytes this worker sent.
- Where any worker's gradient is not finite, so is the result, on every worker; ``discard`` then leaves all state as it was.
- State that all workers share (``state_dict``) and state of this rank (``rank_state_dict``) survive being saved and loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    def grads(self) -> list[Tensor]: ...  # views into flat, one after the other


class Comm(Protocol):
    """The part of ``distributed.comm.Comm`` that compressors use; the names of collectives that are under way must differ."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def allreduce_async(self, tensor: Tensor, name: str, op: Literal["sum", "max"] = "sum") -> Any: ...
    def allgather_async(self, tensor: Tensor, name: str) -> Any: ...
    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> Any: ...


class MeasuringComm(Comm, Protocol):
    """What a choice by measurement has to know besides."""

    def gave_way_for_good(self) -> bool: ...


class Pending(Protocol):
    """A bucket under way."""

    def proceed(self) -> None:
        """Wait for the first of two rounds and begin the second; does nothing where there is one round."""

    def finish(self) -> int:
        """Return when the bucket holds the sum over workers; gives the bytes that this worker sent."""


class Compressor(ABC):
    """Sums buckets over workers. An update is a ``start``, ``proceed`` and ``finish`` of every bucket, then ``commit`` or ``discard``."""

    @abstractmethod
    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        """Begin to replace ``bucket.flat`` by its sum over workers."""

    @abstractmethod
    def commit(self) -> None:
        """The update's sums are finite and will be used: state moves on."""

    @abstractmethod
    def discard(self) -> None:
        """The update is left out: state is again what it was before."""

    @abstractmethod
    def overlap(self) -> bool:
        """Whether buckets should leave while backward runs in the next update."""

    @abstractmethod
    def settled(self) -> bool:
        """Whether that is how it stays, as far as is known."""

    @abstractmethod
    def measured(self, tail_s: float, backward_s: float, comm: MeasuringComm) -> None:
        """What the update just committed cost this worker: from the start of its last backward to its sums, and that backward alone.

        Every worker calls it at the same update; collectives are allowed here, and only here.
        """

    @abstractmethod
    def reset(self) -> None:
        """The update under way is given up, and the next one may be among other workers: what was measured of them counts no more.

        What this worker has not sent, and what all share, stays.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State that is the same on all workers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""

    @abstractmethod
    def rank_state_dict(self) -> dict[str, Tensor]:
        """State of this rank alone, by parameter name, in the parameter's shape."""

    @abstractmethod
    def load_rank_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what ``rank_state_dict`` gave; what is missing counts as zero."""


class Lossy(ABC):
    """A way to sum that does not send everything. It says what it has left out; ``ErrorFeedback`` makes a Compressor of it.

    ``update`` counts the updates that were used. It is the same on all workers, and all that ramps, alternates or draws random numbers goes
    by it.
    """

    @property
    def exact(self) -> bool:
        """Whether nothing will be left out of the update under way; its ``residual`` is then an empty tensor, to be left alone."""
        return False

    @property
    def warm(self) -> bool:
        """Whether the update under way costs what later ones will."""
        return True

    def __init__(self) -> None:
        self.update = 0

    @abstractmethod
    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> Pending:
        """Begin to replace ``bucket.flat`` by (about) its sum over workers.

        By ``finish``, ``residual`` (numel,), whose content is undefined before, holds what of ``bucket.flat`` this worker has not sent. Who
        rounds a partial sum again adds that error to his own.
        """

    def commit(self) -> None:
        """The update was used: state moves on. Overrides call this one."""
        self.update += 1

    def discard(self) -> None:  # noqa: B027, most have nothing to undo
        """The update is left out: state is again what it was before."""

    def reset(self) -> None:
        """As ``Compressor.reset``; by default what ``discard`` does."""
        self.discard()

    def state_dict(self) -> dict[str, Any]:
        """State that is the same on all workers. Overrides add to it."""
        return {"update": self.update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self.update = state["update"]


def ring_bytes(num_bytes: int, size: int) -> int:
    """Bytes that one of ``size`` workers sends in a ring allreduce of ``num_bytes``: every part but one, twice."""
    return 2 * (size - 1) * num_bytes // size


def gather_bytes(part_bytes: Sequence[int], rank: int) -> int:
    """Bytes that worker ``rank`` sends in a ring allgather of parts of these sizes: every part passes him but that of the next worker."""
    return sum(part_bytes) - part_bytes[(rank + 1) % len(part_bytes)]
