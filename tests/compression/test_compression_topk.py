"""topk: who owns what, what is selected, what it costs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import buckets_of
from threads import ThreadComm, run_threads
from torch import Tensor

from horoyolo.compression.base import ring_bytes
from horoyolo.compression.topk import BLOCK, MOST, SUMS, Parts, Selection, TopK

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
YOLOV5S_BUCKET = 6_250_000  # values in 25 MB
NAN = float("nan")


def layers(numel: int, seed: int) -> Tensor:
    """Gradients of layers of 1000 to 20000 values, whose scales differ by two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1000, 20_000, (numel // 1000 + 1,), generator=torch.Generator().manual_seed(0))
    scales = 10 ** (2 * torch.rand(len(sizes), generator=torch.Generator().manual_seed(1)))
    return torch.randn(numel, generator=generator) * scales.repeat_interleave(sizes)[:numel]


def sum_once(gradients: list[Tensor], ratio: float) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Results, residuals and bytes of each worker after one exchange at the full ratio."""

    def work(comm: ThreadComm) -> tuple[Tensor, Tensor, int]:
        gradient = gradients[comm.rank()]
        (bucket,) = buckets_of([(len(gradient),)], bucket_mb=1000)
        bucket.flat.copy_(gradient)
        residual = torch.full_like(bucket.flat, NAN)
        pending = TopK(ratio, warmup_updates=0).start(bucket, comm, residual)
        pending.proceed()
        num_bytes = pending.finish()
        assert num_bytes == comm.sent_bytes
        return bucket.flat, residual, num_bytes

    results, residuals, num_bytes = zip(*run_threads(len(gradients), work), strict=True)
    return list(results), list(residuals), list(num_bytes)


def selected(values: Tensor, ratio: float, phase: int = 0) -> Tensor:
    """Positions that are selected of a part that is a whole bucket."""
    select = Selection(Parts(len(values), 1, phase), ratio)
    return select.largest(values, 0, select.threshold(values[select.sample(len(values))]))


@SETTINGS
@given(numel=st.one_of(st.integers(0, 20), st.integers(0, 6 * BLOCK)), size=st.integers(1, 5), update=st.integers(0, 99))
def test_every_value_has_one_owner_at_a_time_and_each_in_turn_and_views_agree_with_indices(numel, size, update):
    flat, owners = torch.arange(numel), []
    for parts in (Parts(numel, size, update + turn) for turn in range(size)):
        owned_by = torch.full((numel,), -1)
        for owner in range(size):
            index = parts.index(owner, torch.arange(parts.length(owner)))
            assert torch.equal(torch.cat([parts.whole(flat, owner).reshape(-1), flat[parts.tail(owner)]]), index)
            assert (owned_by[index] == -1).all()
            owned_by[index] = owner
        owners.append(owned_by)
    assert all(set(of_value) == set(range(size)) for of_value in torch.stack(owners, 1).tolist())


@pytest.mark.parametrize("phase", [0, 1, 12345])
@pytest.mark.parametrize("ratio", [0.25, 0.01, 0.001])
def test_about_the_share_asked_for_is_selected(ratio, phase):
    values = layers(1_000_003, seed=1)
    wanted = ratio * len(values)
    positions = selected(values, ratio, phase)
    assert 0.7 * wanted <= len(positions) <= MOST * wanted + 1
    left = torch.ones(len(values), dtype=torch.bool)
    left[positions] = False
    assert values[positions].abs().min() >= values[left].abs().max()
    assert (positions.diff() > 0).all()


@SETTINGS
@given(numel=st.integers(1, 3000), ratio=st.floats(0.001, 0.3), seed=st.integers(0, 99))
def test_of_few_values_exactly_the_largest_are_selected(numel, ratio, seed):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    count = math.ceil(ratio * numel)
    assert torch.equal(selected(values, ratio), values.abs().topk(count).indices.sort().values)


def test_equal_values_are_selected_up_to_the_bound():
    assert len(selected(torch.full((300_000,), -0.25), 0.01)) == 3000 * MOST


def test_zeros_and_what_the_wire_would_make_zero_are_not_selected():
    values = torch.zeros(100_000)
    assert len(selected(values, 0.01)) == 0
    values[::7] = 1e-44
    assert len(selected(values, 0.01)) == 0
    values[[3, 77_777]] = 1e-38
    assert selected(values, 0.01).tolist() == [3, 77_777]
    (result, _), residuals, _ = sum_once([values, values], 0.01)
    assert result.nonzero().squeeze(1).tolist() == [3, 77_777]
    assert torch.equal(result + residuals[0] + residuals[1], 2 * values)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [2, 3])
def test_what_is_not_finite_travels_however_many_large_values_there_are(bad, size):
    for where in (0, 99_999, 31_234):
        gradients = [torch.full((100_000,), 3e38 / size) for _ in range(size)]
        gradients[1][where] = bad
        for result in sum_once(gradients, 0.001)[0]:
            assert not result[where].isfinite()


def test_the_sample_walks_over_all_channels_and_taps():
    for length in (10**5, 10**6, YOLOV5S_BUCKET):
        for ratio in (0.25, 0.01, 0.001):
            stride = Selection(Parts(length, 1, 0), ratio).sample(length).step
            assert math.gcd(stride, 6) == 1


@pytest.mark.parametrize(("size", "numel"), [(2, YOLOV5S_BUCKET), (4, 975_000)])
def test_a_hundredth_of_the_values_costs_less_than_a_fortieth_of_their_bytes(size, numel):
    gradient = layers(numel, seed=0)
    results, _, num_bytes = sum_once([gradient.roll(1000 * rank) for rank in range(size)], 0.01)
    assert max(num_bytes) * 40 < ring_bytes(4 * numel, size)
    assert 0.8 * SUMS * 0.01 < results[0].count_nonzero() / numel < MOST * SUMS * 0.01


def test_traffic_does_not_grow_with_the_number_of_workers():
    numel, ratio = 600_000, 0.01
    for size in (2, 4, 8):
        sent = sum_once([layers(numel, seed) for seed in range(size)], ratio)[2]
        share = (1 + SUMS) * (size - 1) / size * ratio * numel
        assert max(sent) < 1.25 * 3.2 * share
        assert sum(sent) / size < 1.1 * 3.2 * share


@pytest.mark.parametrize("size", [2, 4])
def test_where_large_values_lie_does_not_decide_what_is_sent(size):
    """All large values lie in a tenth of the bucket, which with a stretch for each owner a single one would have to send, or leave behind."""
    gradients = [torch.randn(500_000, generator=torch.Generator().manual_seed(seed)) for seed in range(size)]
    for gradient in gradients:
        gradient[:50_000] *= 1000
    anywhere = torch.randperm(500_000, generator=torch.Generator().manual_seed(size))
    together, _, sent = sum_once(gradients, 0.01)
    spread, _, _ = sum_once([gradient[anywhere] for gradient in gradients], 0.01)
    assert together[0].square().sum() > 0.95 * spread[0].square().sum()
    assert max(sent) < 1.15 * min(sent)


def test_all_values_sent_give_the_sum():
    gradients = [layers(10_000, seed) for seed in range(3)]
    (result, *_), residuals, _ = sum_once(gradients, 1.0)
    scale = sum(gradients).abs().max()
    assert (result - sum(gradients)).abs().max() < 0.02 * scale
    assert torch.stack(residuals).abs().max() < 0.02 * scale


def test_what_is_sent_and_what_is_kept_add_up():
    gradients = [layers(200_000, seed) for seed in range(4)]
    (result, *others), residuals, _ = sum_once(gradients, 0.01)
    assert all(torch.equal(result, other) for other in others)
    given = sum(gradient.double() for gradient in gradients)
    got = result.double() + sum(residual.double() for residual in residuals)
    assert (given - got).abs().max() <= 1e-6 * given.abs().max()


def test_the_share_falls_from_a_quarter_to_what_was_asked_for():
    compressor = TopK(0.01, warmup_updates=10)
    shares = []
    for _ in range(12):
        shares.append(compressor.ratio)
        compressor.discard()  # an update left out is no step of the ramp
        compressor.commit()
    assert shares[0] == 0.25
    assert shares[5] == pytest.approx(0.05)  # the geometric mean of both
    assert shares[10:] == [0.01, 0.01]
    steps = [later / earlier for earlier, later in itertools.pairwise(shares[:11])]
    assert max(steps) == pytest.approx(min(steps))
    assert TopK(0.01, warmup_updates=0).ratio == 0.01
    assert TopK(0.5, warmup_updates=10).ratio == 0.5
