"""The wire format of a few values of a long vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.compression.sparse import MOST_SKIPS, SKIP, decode, encode, from_halves, to_halves, upper_half

FULL = SKIP * MOST_SKIPS  # what the largest byte skips
EDGES = [0, 1, SKIP - 1, SKIP, SKIP + 1, 2 * SKIP, FULL - 1, FULL, FULL + 1, FULL + SKIP - 1, FULL + SKIP, 2 * FULL, 3 * FULL - 1, 10**6]
GAPS = st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 3), st.integers(0, 20_000)), max_size=60)
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def positions_of(gaps: list[int]) -> torch.Tensor:
    """Positions with so many places free before each."""
    return torch.cumsum(torch.tensor(gaps, dtype=torch.int64) + 1, 0) - 1


@SETTINGS
@given(st.lists(GAPS, max_size=4))
def test_every_position_comes_back_and_messages_end_where_they_end(of_messages):
    sent = [(positions_of(gaps), torch.randn(len(gaps), generator=torch.Generator().manual_seed(len(gaps)))) for gaps in of_messages]
    messages = [encode(positions, values) for positions, values in sent]
    got = list(decode(torch.cat([torch.empty(0, dtype=torch.int32), *messages])))
    assert [num_words for _, _, num_words in got] == [len(message) for message in messages]
    for (positions, values), (got_positions, got_values, _) in zip(sent, got, strict=True):
        assert torch.equal(got_positions, positions)
        assert torch.equal(got_values, upper_half(values))


@pytest.mark.parametrize("gap", EDGES)
def test_a_value_alone_comes_back_from_any_place(gap):
    ((positions, values, _),) = decode(encode(positions_of([gap]), torch.tensor([-1.5])))
    assert positions.tolist() == [gap]
    assert values.tolist() == [-1.5]


@pytest.mark.parametrize(("ratio", "most_bytes"), [(0.25, 3.01), (0.01, 3.12), (0.001, 3.9), (0.0001, 5.0)])
def test_a_position_costs_about_a_byte(ratio, most_bytes):
    positions = (torch.rand(4_000_000, generator=torch.Generator().manual_seed(0)) < ratio).nonzero().squeeze(1)
    assert 4 * len(encode(positions, torch.ones(len(positions)))) < most_bytes * len(positions) + 12


def test_halves_are_bfloat16_and_never_larger_than_the_value():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-37, 37, 1000)
    halves = upper_half(values)
    assert torch.equal(halves, halves.to(torch.bfloat16).float())
    assert (halves.abs() <= values.abs()).all()
    assert ((values - halves).abs() <= values.abs() / 128 + 2.0**-133).all()  # the step of numbers too small to be normal
    assert torch.equal(upper_half(halves), halves)


def test_the_largest_number_stays_finite_and_what_is_not_finite_stays_so():
    largest = torch.finfo(torch.float32).max
    assert upper_half(torch.tensor([largest, -largest])).isfinite().all()
    signalling = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN with nothing in its upper half
    bad = torch.cat([torch.tensor([float("inf"), -float("inf"), float("nan")]), signalling])
    assert not from_halves(to_halves(bad)).isfinite().any()
    assert upper_half(bad)[:2].tolist() == [float("inf"), -float("inf")]
