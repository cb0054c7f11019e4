"""Fewer bits a value: codecs for ``Scatter``.

All but bfloat16 give every block of values a scale of its own, the first four bytes of its row. A scale that is infinite or NaN makes the block so.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from horoyolo.compression.scatter import piece_values

SCALE_BYTES = 4
EXPONENT = 0x7F800000  # the bits of a float32 that are its power of two
SIGN = -(1 << 31)  # its sign bit
SMALLEST = 2.0**-126  # scales stay normal numbers, so that they have an inverse
BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
LEVELS = 127 / (1 + 2**-20)  # of int8 on either side of zero; a hair less, since rounding must not carry the largest value past 127
PACK = sum(1 << 56 - 7 * bit for bit in range(8))
FLOAT_BLOCK = 1024  # values with a scale of their own


@dataclass(frozen=True)
class Float16:
    """Float16 after division by a power of two, so that no block is too large or too small for its five bits of exponent."""

    block: int = FLOAT_BLOCK

    @property
    def row_bytes(self) -> int:
        return SCALE_BYTES + 2 * self.block

    def encode(self, values: Tensor, rows: Tensor, lost: Tensor, draws: random.Random) -> None:
        power = (values.abs().amax(1, keepdim=True).view(torch.int32) & EXPONENT).view(torch.float32)  # infinite for NaN, too
        scales = power.mul_(2.0**-14).clamp_(min=SMALLEST)  # the largest value becomes at most 2^15
        scaled = values * scales.reciprocal()
        codes = _codes(rows, torch.float16, values.shape[1]).copy_(scaled)
        _scales(rows).copy_(scales)
        torch.addcmul(values, scaled.copy_(codes), scales, value=-1, out=lost)

    def decode(self, rows: Tensor, values: Tensor) -> None:
        values.copy_(_codes(rows, torch.float16, values.shape[1])).mul_(_scales(rows))


@dataclass(frozen=True)
class BFloat16:
    """The upper half of a float32, rounded to nearest; what would round to infinity becomes the largest number."""

    block: int = FLOAT_BLOCK

    @property
    def row_bytes(self) -> int:
        return 2 * self.block

    def encode(self, values: Tensor, rows: Tensor, lost: Tensor, draws: random.Random) -> None:
        clamped = values.clamp(-BFLOAT16_MAX, BFLOAT16_MAX).add_(values, alpha=0)  # what is infinite must show: it times 0 is NaN
        codes = rows.view(torch.bfloat16)[:, : values.shape[1]].copy_(clamped)
        torch.sub(values, clamped.copy_(codes), out=lost)

    def decode(self, rows: Tensor, values: Tensor) -> None:
        values.copy_(rows.view(torch.bfloat16)[:, : values.shape[1]])


@dataclass(frozen=True)
class Int8:
    """Eight bits, rounded up or down at random so that the mean is right (QSGD: Alistarh et al. 2017), in steps of the block's largest / 127."""

    block: int

    @property
    def row_bytes(self) -> int:
        return SCALE_BYTES + _up(self.block)

    def encode(self, values: Tensor, rows: Tensor, lost: Tensor, draws: random.Random) -> None:
        steps = values.abs().amax(1, keepdim=True).div_(LEVELS).clamp_(min=SMALLEST)
        codes = torch.addcmul(_noise(values, draws), values, steps.reciprocal()).floor_()
        _scales(rows).copy_(steps)
        _codes(rows, torch.int8, values.shape[1]).copy_(codes)
        torch.addcmul(values, codes, steps, value=-1, out=lost)

    def decode(self, rows: Tensor, values: Tensor) -> None:
        values.copy_(_codes(rows, torch.int8, values.shape[1])).mul_(_scales(rows))


@dataclass(frozen=True)
class OneBit:
    """The sign, times the block's mean magnitude (scaled sign: Karimireddy et al. 2019; Seide et al. 2014 sent one bit first)."""

    block: int

    @property
    def row_bytes(self) -> int:
        return SCALE_BYTES + _up(-(-self.block // 8))

    def encode(self, values: Tensor, rows: Tensor, lost: Tensor, draws: random.Random) -> None:
        width = values.shape[1]
        means = values.mul(1 / width).abs_().sum(1, keepdim=True)  # divided first: the sum may be too large for a float32
        signs = values.view(torch.int32) & SIGN
        bits = signs.new_zeros(len(rows), _up(width, 8), dtype=torch.bool) if width % 8 else torch.empty_like(signs, dtype=torch.bool)
        bits[:, :width].copy_(signs)
        _scales(rows).copy_(means)
        _codes(rows, torch.uint8, bits.shape[1] // 8).copy_(pack(bits))
        torch.sub(values, (signs | means.view(torch.int32)).view(torch.float32), out=lost)

    def decode(self, rows: Tensor, values: Tensor) -> None:
        width = values.shape[1]
        values.copy_(unpack_signs(_codes(rows, torch.uint8, -(-width // 8)))[:, :width]).mul_(_scales(rows))


def pack(bits: Tensor) -> Tensor:
    """(blocks, 8 n) bool as (blocks, n) uint8, the first in the lowest bit.

    Eight bools are a 64-bit number with 0 or 1 in each byte; the product moves that of byte i to bit 56 + i, and nothing else comes there.
    """
    return (bits.view(torch.int64) * PACK >> 56).to(torch.uint8)


def unpack_signs(packed: Tensor) -> Tensor:
    """(blocks, n) uint8 as (blocks, 8 n) int8: 1 for a 0 and -1 for a 1."""
    table = _sign_table(packed.device)
    return table.index_select(0, packed.flatten().int()).view(torch.int8).view(len(packed), -1)


@functools.cache
def _sign_table(device: torch.device) -> Tensor:
    """The eight signs of each byte, as one 64-bit number."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return (1 - 2 * bits).to(torch.int8).view(torch.int64).flatten()


def _noise(values: Tensor, draws: random.Random) -> Tensor:
    """Random numbers from 0 to 1, as many as ``values``, from a random place in a table: drawing them anew would take longer than all else."""
    numel = values.numel()
    table = _noise_table(2 * max(numel, piece_values(values.device)), values.device)
    first = draws.randrange(len(table) - numel)
    return table[first : first + numel].view(values.shape)


@functools.cache
def _noise_table(numel: int, device: torch.device) -> Tensor:
    """Evenly spaced in random order, so that their mean is exactly a half."""
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(numel))
    return order.add(0.5).div(numel).to(device)


def _scales(rows: Tensor) -> Tensor:
    return rows[:, :SCALE_BYTES].view(torch.float32)  # (blocks, 1)


def _codes(rows: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    return rows[:, SCALE_BYTES:].view(dtype)[:, :width]


def _up(number: int, multiple: int = SCALE_BYTES) -> int:
    """Rounded up, so that the next row's scale is aligned."""
    return -(-number // multiple) * multiple
