"""Where the time of an exchange goes: encoding, waiting for the network, decoding."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Compressor, Pending


@dataclass
class Costs:
    """Of one worker, summed over buckets and updates."""

    encode_s: float = 0.0  # in `start`
    decode_s: float = 0.0  # in `proceed` and `finish`
    wait_s: float = 0.0  # for collectives, wherever; neither of the others
    wire_bytes: int = 0  # as declared
    updates: int = 0

    def clear(self) -> None:
        """Begin again."""
        self.encode_s = self.decode_s = self.wait_s = 0.0
        self.wire_bytes = self.updates = 0

    def per_update(self) -> dict[str, float]:
        """Means over updates."""
        return {name: value / max(self.updates, 1) for name, value in vars(self).items() if name != "updates"}


class TimedCompressor:
    """A compressor whose work is timed; all else is the compressor's own."""

    def __init__(self, compressor: Compressor, costs: Costs):
        self._compressor = compressor
        self._costs = costs

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        with _timed(self._costs, "encode_s"):
            pending = self._compressor.start(bucket, _TimedComm(comm, self._costs))
        return _TimedPending(pending, self._costs)

    def commit(self) -> None:
        self._costs.updates += 1
        self._compressor.commit()

    def discard(self) -> None:
        self._costs.updates += 1
        self._compressor.discard()

    def overlap(self) -> bool:
        return self._compressor.overlap()

    def settled(self) -> bool:
        return False  # rows take turns: what gives way for good in one of them would be starved in those that leave during backward

    def measured(self, tail_s: float, backward_s: float, comm: Any) -> None:
        self._compressor.measured(tail_s, backward_s, comm)

    def reset(self) -> None:
        self._compressor.reset()


@dataclass(frozen=True)
class _TimedPending:
    pending: Pending
    costs: Costs

    def proceed(self) -> None:
        with _timed(self.costs, "decode_s"):
            self.pending.proceed()

    def finish(self) -> int:
        with _timed(self.costs, "decode_s"):
            wire_bytes = self.pending.finish()
        self.costs.wire_bytes += wire_bytes
        return wire_bytes


@dataclass(frozen=True)
class _TimedComm:
    comm: Comm
    costs: Costs

    def rank(self) -> int:
        return self.comm.rank()

    def size(self) -> int:
        return self.comm.size()

    def allreduce_async(self, tensor: Tensor, name: str, op: Any = "sum") -> _TimedHandle:
        return _TimedHandle(self.comm.allreduce_async(tensor, name, op), self.costs)

    def allgather_async(self, tensor: Tensor, name: str) -> _TimedHandle:
        return _TimedHandle(self.comm.allgather_async(tensor, name), self.costs)

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> _TimedHandle:
        return _TimedHandle(self.comm.alltoall_async(tensor, splits, name), self.costs)


@dataclass(frozen=True)
class _TimedHandle:
    handle: Any
    costs: Costs

    def wait(self) -> Any:
        started_s = time.perf_counter()
        result = self.handle.wait()
        self.costs.wait_s += time.perf_counter() - started_s
        return result


@contextlib.contextmanager
def _timed(costs: Costs, name: str) -> Iterator[None]:
    """Adds the time of the block to one of the costs, but for what it waited."""
    started_s, waited_s = time.perf_counter(), costs.wait_s
    yield
    spent_s = time.perf_counter() - started_s - (costs.wait_s - waited_s)
    setattr(costs, name, getattr(costs, name) + spent_s)
