"""Sums of encoded values, which cannot be added on the wire: every worker adds up one part of the bucket for all.

Each worker sends the others their parts of its bucket, encoded (alltoall), sums its own part in float32, and sends that sum to all, encoded again
(allgather). As in a ring allreduce each worker sends 2 (N - 1) / N of a bucket, here an encoded one, however many workers N there are; if all
gathered all encoded buckets it would be N - 1 of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Lossy

CPU_PIECE = 1 << 17  # values handled at a time: what a codec makes of them on its way stays in cache
GPU_PIECE = 1 << 22  # here starting a kernel costs more than going to memory
CPU_MESSAGE_BYTES = 1 << 18  # sent by each worker at a time
GPU_MESSAGE_BYTES = 1 << 22
LEAST_BYTES = 1 << 15  # of a message to one worker: each costs a call of the codec, and among many workers there would be ever more of them


class Codec(Protocol):
    """Float32 values as bytes: each block of ``block`` values (the last one may be shorter) becomes a row of ``row_bytes`` bytes.

    Where values are not finite, what they decode to is not finite either, at these or at other places of their block. Finite ones stay finite,
    unless they are within 0.1 % of the largest float32.
    """

    @property
    def block(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...

    def columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of ``rows`` (..., blocks, row_bytes) uint8 in the types that they hold, each (..., blocks, its number in a row)."""

    def encode(self, values: Tensor, lost: Tensor, columns: Sequence[Tensor], draws: random.Random) -> None:
        """Write ``values`` (blocks, block or less) to ``columns``, and to ``lost`` what decoding will miss of them."""

    def decode(self, columns: Sequence[Tensor], values: Tensor) -> None:
        """Write to ``values`` (blocks, block or less) what ``columns`` hold."""


class Scatter(Lossy):
    """Sums buckets in the form that ``codec`` gives them. A worker's own part is not sent, so it enters the sum as it is.

    A bucket leaves as many short messages: the first are summed and sent again while the next are still on their way, and encoded while others
    travel. Besides, two long messages that meet on a link hold up each other's acknowledgements until they go one after the other, which takes
    twice as long (Heusse et al. 2011, "Two-way TCP connections: old problem, new insight"); short ones take turns.
    """

    def __init__(self, codec: Codec):
        super().__init__()
        self._codec = codec

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> _Pending:
        """Send the other workers their parts, which are equally long: values run out in the last ones."""
        codec, rank, size = self._codec, comm.rank(), comm.size()
        part_rows = -(-bucket.flat.numel() // (codec.block * size))
        draws = random.Random(f"{self.update} {bucket.name} {rank}")  # a discarded update draws them again
        to_each = message_bytes(bucket.flat.device) // (size - 1)
        at_once = max(1, max(LEAST_BYTES, to_each) // codec.row_bytes)
        pending = _Pending(codec, bucket, comm, part_rows, residual, draws, [])
        for first in range(0, part_rows, at_once):
            pending.send(slice(first, min(first + at_once, part_rows)))
        return pending


@dataclass(frozen=True)
class _Pending:
    codec: Codec
    bucket: Bucket
    comm: Comm
    part_rows: int  # blocks of each worker's part, the last ones empty where values run out
    residual: Tensor
    draws: random.Random
    messages: list[tuple[slice, Any]]  # blocks of every part, and the handle of the collective that they are in

    def send(self, rows: slice) -> None:
        """Send each other worker these blocks of its part, encoded."""
        rank, size = self.comm.rank(), self.comm.size()
        others = [other for other in range(size) if other != rank]
        count = rows.stop - rows.start
        encoded = _new_rows(self.codec, len(others) * count, self.residual.device)
        for other, of_other in zip(others, encoded.view(len(others), count, self.codec.row_bytes), strict=True):
            for (given, missed), columns in pieces(self.codec, self._values(other, rows), of_other):
                self.codec.encode(given, missed, columns, self.draws)
        splits = [0 if other == rank else count for other in range(size)]
        self.messages.append((rows, self.comm.alltoall_async(encoded, splits, f"{self.bucket.name}.parts.{rows.start}")))

    def proceed(self) -> None:
        for index, (rows, handle) in enumerate(self.messages):
            received, _ = handle.wait()
            self.messages[index] = rows, self._send_sum(rows, received)

    def _send_sum(self, rows: slice, received: Tensor) -> Any:
        """Add to own blocks what the others sent of them, and send the sums to all."""
        count = rows.stop - rows.start
        encoded = _new_rows(self.codec, count, self.residual.device)
        own = self._values(self.comm.rank(), rows)
        terms = pieces(self.codec, own, received.view(-1, count, self.codec.row_bytes))
        for ((total, lost), of_workers), (_, columns) in zip(terms, pieces(self.codec, own, encoded), strict=True):
            term = torch.empty_like(total)
            for of_worker in zip(*of_workers, strict=True):
                self.codec.decode(of_worker, term)
                total.add_(term)
            self.codec.encode(total, lost, columns, self.draws)
        return self.comm.allgather_async(encoded, f"{self.bucket.name}.sums.{rows.start}")

    def finish(self) -> int:
        for rows, handle in self.messages:
            gathered = handle.wait().view(self.comm.size(), rows.stop - rows.start, self.codec.row_bytes)
            for owner, encoded in enumerate(gathered):
                for (values, _), columns in pieces(self.codec, self._values(owner, rows), encoded):
                    self.codec.decode(columns, values)
        return 2 * (self.comm.size() - 1) * self.part_rows * self.codec.row_bytes

    def _values(self, owner: int, rows: slice) -> tuple[Tensor, Tensor]:
        """These blocks of an owner's part, of the bucket and of its residual; short or empty where values run out."""
        start = owner * self.part_rows
        span = slice((start + rows.start) * self.codec.block, (start + rows.stop) * self.codec.block)
        return self.bucket.flat[span], self.residual[span]


def pieces(codec: Codec, flats: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The same blocks of equally long ``flats`` as (blocks, block), and their columns of ``rows`` (..., blocks, row_bytes), some blocks at a time.

    A shorter block at the end comes alone, as (1, its length).
    """
    block, numel, columns = codec.block, flats[0].numel(), codec.columns(rows)
    whole, at_once = numel // block, max(1, piece_values(flats[0].device) // block)
    for first in range(0, whole, at_once):
        count = min(at_once, whole - first)
        views = [flat[first * block : (first + count) * block].view(count, block) for flat in flats]
        yield views, [column.narrow(-2, first, count) for column in columns]
    if whole * block < numel:
        yield [flat[whole * block :].view(1, -1) for flat in flats], [column.narrow(-2, whole, 1) for column in columns]


def piece_values(device: torch.device) -> int:
    """How many values are handled at a time, unless blocks are longer."""
    return CPU_PIECE if device.type == "cpu" else GPU_PIECE


def message_bytes(device: torch.device) -> int:
    """How much a worker sends at a time."""
    return CPU_MESSAGE_BYTES if device.type == "cpu" else GPU_MESSAGE_BYTES


def _new_rows(codec: Codec, num_rows: int, device: torch.device) -> Tensor:
    """Zeros: rows and ends of rows without values are sent too."""
    return torch.zeros(num_rows, codec.row_bytes, dtype=torch.uint8, device=device)
