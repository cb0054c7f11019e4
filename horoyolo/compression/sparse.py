"""A few values of a long vector, packed into few bytes.

A message is a run of 32-bit words: how many values it holds, how many words it has, the values, the gaps between their positions. It knows
its own length, so messages can be sent one after the other.

Values go as the upper half of a 32-bit float, which is a bfloat16 rounded towards zero: unlike rounding to nearest that never makes an
infinity of a finite number, and what it leaves is itself a 32-bit float, so a sender can keep it exactly.

Gaps go as bytes, about one a value where a hundredth of the values is sent (the entropy of such positions is 8.1 bits each), two where a
thousandth is. A byte below ``SKIP`` ends a gap; one from there on stands for 1 to 32 times ``SKIP`` places without a value, and may repeat.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SKIP = 224
MOST_SKIPS = 256 - SKIP  # in one byte
HEADER_WORDS = 2


def upper_half(values: Tensor) -> Tensor:
    """What of float32 ``values`` (n,) goes into a message, as float32: rounded towards zero, infinities and NaN stay."""
    return from_halves(to_halves(values))


def to_halves(values: Tensor) -> Tensor:
    """The upper halves of float32 ``values`` (n,) as int16. A NaN whose bits are all in the lower half becomes an infinity."""
    return (values.view(torch.int32) >> 16).to(torch.int16)


def from_halves(halves: Tensor) -> Tensor:
    """Float32 values (n,) of their upper halves."""
    return (halves.to(torch.int32) << 16).view(torch.float32)


def encode(positions: Tensor, values: Tensor) -> Tensor:
    """The message (words,) int32 that holds float32 ``values`` (n,) at rising ``positions`` (n,) int64, from 0."""
    codes = _gap_codes(positions)
    body = torch.cat([to_halves(values).view(torch.uint8), codes])
    num_words = HEADER_WORDS + -(-len(body) // 4)
    message = torch.empty(num_words, dtype=torch.int32, device=values.device)
    message[0], message[1] = len(values), num_words
    room = message[HEADER_WORDS:].view(torch.uint8)
    room[: len(body)] = body
    room[len(body) :] = 255  # skips that no value follows
    return message


def decode(messages: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Positions (n,) int64, values (n,) float32 and the number of words of each message in a run of them (words,) int32."""
    while len(messages):
        num_values, num_words = messages[:HEADER_WORDS].tolist()
        body = messages[HEADER_WORDS:num_words].view(torch.uint8)
        halves, codes = body[: 2 * num_values], body[2 * num_values :]
        yield _positions(codes), from_halves(halves.view(torch.int16)), num_words
        messages = messages[num_words:]


def _gap_codes(positions: Tensor) -> Tensor:
    gaps = torch.diff(positions, prepend=positions.new_full((1,), -1)).to(torch.int32) - 1  # places without a value before each
    skips = torch.div(gaps, SKIP, rounding_mode="trunc")
    num_skips = torch.div(skips + (MOST_SKIPS - 1), MOST_SKIPS, rounding_mode="trunc")  # bytes of them, all full but the last
    ends = torch.cumsum(num_skips + 1, 0) - 1  # where the byte is that ends a gap
    codes = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), 255, dtype=torch.uint8, device=positions.device)
    # The last skip of a gap, and where there is none a byte that is written again below.
    codes[(ends - 1).clamp(min=0)] = (SKIP - 1 + skips - (num_skips - 1) * MOST_SKIPS).to(torch.uint8)
    codes[ends] = (gaps - skips * SKIP).to(torch.uint8)
    return codes


def _positions(codes: Tensor) -> Tensor:
    is_end = codes < SKIP
    steps = codes.to(torch.int64)
    places = torch.where(is_end, steps + 1, (steps - (SKIP - 1)) * SKIP)
    return torch.cumsum(places, 0)[is_end] - 1
