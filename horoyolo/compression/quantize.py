"""Fewer bits a value: codecs for ``Scatter``.

All but bfloat16 give every block of values a scale of its own at the start of its row: four bytes, of ``OneBit`` one that holds an exponent. A scale
that is infinite or NaN makes the block so.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from horoyolo.compression.scatter import piece_values

SCALE_BYTES = 4
EXPONENT = 0x7F800000  # the bits of a float32 that are its power of two
SIGN = -(1 << 31)  # its sign bit
MANTISSA_BITS = 23
LARGEST_EXPONENT = 254  # of finite numbers
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
        return SCALE_BYTES + _up(2 * self.block)

    def columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        return _scales(rows), rows[..., SCALE_BYTES:].view(torch.float16)

    def encode(self, values: Tensor, lost: Tensor, columns: Sequence[Tensor], draws: random.Random) -> None:
        scales, codes = _fit(columns, values)
        power = (_largest(values, lost).view(torch.int32) & EXPONENT).view(torch.float32)  # infinite for NaN, too
        torch.clamp(power.mul_(2.0**-14), min=SMALLEST, out=scales)  # the largest value becomes at most 2^15
        codes.copy_(torch.mul(values, scales.reciprocal(), out=lost))
        torch.addcmul(values, lost.copy_(codes), scales, value=-1, out=lost)

    def decode(self, columns: Sequence[Tensor], values: Tensor) -> None:
        scales, codes = _fit(columns, values)
        values.copy_(codes).mul_(scales)


@dataclass(frozen=True)
class BFloat16:
    """The upper half of a float32, rounded to nearest; what would round to infinity becomes the largest number."""

    block: int = FLOAT_BLOCK

    @property
    def row_bytes(self) -> int:
        return 2 * self.block

    def columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.view(torch.bfloat16),)

    def encode(self, values: Tensor, lost: Tensor, columns: Sequence[Tensor], draws: random.Random) -> None:
        (codes,) = _fit(columns, values)
        torch.clamp(values, -BFLOAT16_MAX, BFLOAT16_MAX, out=lost).add_(values, alpha=0)  # infinity times 0 is NaN: it must show
        torch.sub(values, lost.copy_(codes.copy_(lost)), out=lost)

    def decode(self, columns: Sequence[Tensor], values: Tensor) -> None:
        values.copy_(_fit(columns, values)[0])


@dataclass(frozen=True)
class Int8:
    """Eight bits, rounded up or down at random so that the mean is right (QSGD: Alistarh et al. 2017), in steps of the block's largest / 127."""

    block: int

    @property
    def row_bytes(self) -> int:
        return SCALE_BYTES + _up(self.block)

    def columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        return _scales(rows), rows[..., SCALE_BYTES:].view(torch.int8)

    def encode(self, values: Tensor, lost: Tensor, columns: Sequence[Tensor], draws: random.Random) -> None:
        steps, codes = _fit(columns, values)
        torch.clamp(_largest(values, lost).div_(LEVELS), min=SMALLEST, out=steps)
        codes.copy_(torch.addcmul(_noise(values, draws), values, steps.reciprocal(), out=lost).floor_())
        torch.addcmul(values, lost, steps, value=-1, out=lost)

    def decode(self, columns: Sequence[Tensor], values: Tensor) -> None:
        steps, codes = _fit(columns, values)
        values.copy_(codes).mul_(steps)


@dataclass(frozen=True)
class OneBit:
    """The sign, times the block's mean magnitude (Karimireddy et al. 2019; Seide et al. 2014 sent one bit first), rounded to a power of two.

    A power of two takes one byte, so that blocks can be short: values of a block are all sent as equally large, and where a channel with
    small gradients shares one with others, its weights get their noise.
    """

    block: int

    @property
    def row_bytes(self) -> int:
        return 1 + -(-self.block // 8)

    def columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows[..., :1], rows[..., 1:]

    def encode(self, values: Tensor, lost: Tensor, columns: Sequence[Tensor], draws: random.Random) -> None:
        powers, packed = columns
        width = values.shape[1]
        torch.mul(values, 1 / width, out=lost)  # before they are added: the sum may be too large for a float32
        exponents = _nearest_power(torch.sum(lost.abs_(), 1, keepdim=True))
        powers.copy_(exponents)
        signs = torch.bitwise_and(values.view(torch.int32), SIGN, out=lost.view(torch.int32))
        bits = signs.bool() if width % 8 == 0 else torch.nn.functional.pad(signs.bool(), (0, -width % 8))
        packed[:, : bits.shape[1] // 8] = pack(bits)
        signs |= exponents << MANTISSA_BITS  # what they decode to
        torch.sub(values, lost, out=lost)

    def decode(self, columns: Sequence[Tensor], values: Tensor) -> None:
        powers, packed = columns
        width = values.shape[1]
        values.copy_(unpack_signs(packed[:, : -(-width // 8)])[:, :width]).mul_((powers.int() << MANTISSA_BITS).view(torch.float32))


def _nearest_power(means: Tensor) -> Tensor:
    """The exponents, as float32 has them in its bits (int32), of powers of two from 2/3 to 4/3 of ``means``, which are not negative.

    Either end removes 8/9 of what the mean itself would of the norm of what waits. Below the smallest normal number it is that of zero, and of
    what is not finite that of infinity.
    """
    bits = means.view(torch.int32) & ~SIGN
    return torch.maximum((bits + (1 << MANTISSA_BITS - 1) >> MANTISSA_BITS).clamp_(max=LARGEST_EXPONENT), bits >> MANTISSA_BITS)


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


def _largest(values: Tensor, scratch: Tensor) -> Tensor:
    """The largest magnitude of each row, (blocks, 1); NaN where there is one."""
    return torch.abs(values, out=scratch).amax(1, keepdim=True)


def _scales(rows: Tensor) -> Tensor:
    return rows[..., :SCALE_BYTES].view(torch.float32)  # (..., blocks, 1)


def _fit(columns: Sequence[Tensor], values: Tensor) -> tuple[Tensor, ...]:
    """Scales, if any, and as many codes as values: the last block and the end of a row may be shorter."""
    *scales, codes = columns
    return *scales, codes.narrow(1, 0, values.shape[1])


def _up(number: int, multiple: int = SCALE_BYTES) -> int:
    """Rounded up, so that the next row's scale is aligned."""
    return -(-number // multiple) * multiple
