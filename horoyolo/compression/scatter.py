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
    """Sums buckets in the form that ``codec`` gives them. A worker's own part is not sent, so it enters the sum as it is."""

    def __init__(self, codec: Codec):
        super().__init__()
        self._codec = codec

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> _Pending:
        """Send the other workers their parts, which are equally long: values run out in the last ones."""
        codec, rank, size = self._codec, comm.rank(), comm.size()
        part_rows = -(-bucket.flat.numel() // (codec.block * size))
        draws = random.Random(f"{self.update} {bucket.name} {rank}")  # a discarded update draws them again
        values, lost = _parts(bucket.flat, size, part_rows * codec.block), _parts(residual, size, part_rows * codec.block)
        others = [other for other in range(size) if other != rank]
        rows = _new_rows(codec, len(others) * part_rows, bucket.flat.device)
        shape = torch.Size((len(others), part_rows, codec.row_bytes))
        for other, encoded in zip(others, rows.view(shape), strict=True):
            for (given, missed), columns in pieces(codec, (values[other], lost[other]), encoded):
                codec.encode(given, missed, columns, draws)
        splits = [0 if other == rank else part_rows for other in range(size)]
        handle = comm.alltoall_async(rows, splits, f"{bucket.name}.parts")
        return _Pending(codec, bucket, comm, values[rank], lost[rank], shape, draws, handle)


@dataclass
class _Pending:
    codec: Codec
    bucket: Bucket
    comm: Comm
    total: Tensor  # this worker's part of the bucket
    lost: Tensor  # of its residual
    shape: torch.Size  # of what is sent to the others: (other workers, blocks of a part, row_bytes)
    draws: random.Random
    handle: Any

    def proceed(self) -> None:
        received, _ = self.handle.wait()
        rows = _new_rows(self.codec, self.shape[1], self.total.device)
        terms = pieces(self.codec, (self.total,), received.view(self.shape))
        for (_, of_workers), ((total, lost), columns) in zip(terms, pieces(self.codec, (self.total, self.lost), rows), strict=True):
            term = torch.empty_like(total)
            for of_worker in zip(*of_workers, strict=True):
                self.codec.decode(of_worker, term)
                total.add_(term)
            self.codec.encode(total, lost, columns, self.draws)
        self.handle = self.comm.allgather_async(rows, f"{self.bucket.name}.sums")

    def finish(self) -> int:
        for (values,), columns in pieces(self.codec, (self.bucket.flat,), self.handle.wait()):
            self.codec.decode(columns, values)
        return 2 * self.shape.numel()


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


def _parts(flat: Tensor, size: int, part_values: int) -> list[Tensor]:
    """``size`` consecutive parts; the last ones are short or empty where values run out."""
    return [flat[rank * part_values : (rank + 1) * part_values] for rank in range(size)]


def _new_rows(codec: Codec, num_rows: int, device: torch.device) -> Tensor:
    """Zeros: rows and ends of rows without values are sent too."""
    return torch.zeros(num_rows, codec.row_bytes, dtype=torch.uint8, device=device)
