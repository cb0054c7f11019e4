"""The laws of the contract over every entry of the table, on one to four workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import KINDS, Round, buckets_of, check_conservation, check_same_bits, flat_residual, take_update, values
from threads import ThreadComm, run_threads

from horoyolo.compression.build import COMPRESSORS, build_compressor
from horoyolo.config import Comms

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 700)),
        st.tuples(st.integers(1, 24), st.integers(1, 24)),
        st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    ),
    min_size=1,
    max_size=5,
)
KIND = st.sampled_from(KINDS)
WORKERS = st.integers(1, 4)


def build(name: str, warmup_updates: int = 1) -> Any:
    return build_compressor(Comms(compression=name, warmup_updates=warmup_updates, int8_block=64, onebit_block=64, topk_ratio=0.1, powersgd_rank=2))


def worker(name: str, shapes: list, channels_last: bool, kinds: list[str], seed: int) -> Any:
    """What a worker does in the laws below: one update a kind, with gradients that differ between workers."""

    def work(comm: ThreadComm) -> tuple[list[list[Round]], int]:
        compressor = build(name)
        buckets = buckets_of(shapes, channels_last, bucket_mb=0.004)
        generator = torch.Generator().manual_seed(1000 * seed + comm.rank())
        rounds = []
        for kind in kinds:
            rounds.append(take_update(compressor, buckets, [values(kind, bucket.flat.numel(), generator) for bucket in buckets], comm))
        return rounds, comm.sent_bytes

    return work


@pytest.mark.parametrize("name", COMPRESSORS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(size=WORKERS, shapes=SHAPES, channels_last=st.booleans(), kinds=st.lists(KIND, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_sums_conserve_agree_and_cost_what_they_say(name, size, shapes, channels_last, kinds, seed):
    seen = run_threads(size, worker(name, shapes, channels_last, kinds, seed))
    for update in range(len(kinds)):
        for bucket in range(len(seen[0][0][update])):
            rounds = [rounds[update][bucket] for rounds, _ in seen]
            assert torch.isfinite(rounds[0].result).all()
            check_same_bits(rounds)
            check_conservation(rounds)
    for rounds, sent_bytes in seen:
        assert sum(round_.declared_bytes for update in rounds for round_ in update) == sent_bytes


@pytest.mark.parametrize("name", COMPRESSORS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=WORKERS, where=st.integers(0, 10**6), bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), data=st.data())
def test_what_is_not_finite_on_one_worker_shows_on_all_and_changes_no_state(name, size, where, bad, data):
    culprit = data.draw(st.integers(0, size - 1))
    update = data.draw(st.integers(0, 3))

    def work(comm: ThreadComm) -> tuple[list[list[Round]], list[Round]]:
        generator = torch.Generator().manual_seed(comm.rank())
        gradients = [[torch.randn(bucket.flat.numel(), generator=generator) for bucket in buckets_of([(12, 30), (40,)])] for _ in range(4)]
        plain, spoilt = build(name), build(name)
        buckets = buckets_of([(12, 30), (40,)])
        expected = [take_update(plain, buckets, of_update, comm) for of_update in gradients]
        got = []
        for index, of_update in enumerate(gradients):
            if index == update:
                broken = [flat.clone() for flat in of_update]
                if comm.rank() == culprit:
                    broken[0][where % broken[0].numel()] = bad
                refused = take_update(spoilt, buckets, broken, comm)
                assert not torch.isfinite(refused[0].result).all()
                assert torch.equal(refused[0].residual_before, refused[0].residual_after)
            got.append(take_update(spoilt, buckets, of_update, comm))
        return expected, got

    for expected, got in run_threads(size, work):
        for of_update, other in zip(expected, got, strict=True):
            for left, right in zip(of_update, other, strict=True):
                assert torch.equal(left.result, right.result)
                assert torch.equal(left.residual_after, right.residual_after)


@pytest.mark.parametrize("name", COMPRESSORS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=WORKERS, saved_after=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_compressor_goes_on_from_its_saved_state(name, size, saved_after, seed):
    def work(comm: ThreadComm) -> None:
        generator = torch.Generator().manual_seed(100 * seed + comm.rank())
        buckets = buckets_of([(9, 5, 3, 3), (30,), (20, 20)], channels_last=True)
        gradients = [[torch.randn(bucket.flat.numel(), generator=generator) for bucket in buckets] for _ in range(6)]
        one = build(name, warmup_updates=2)
        for of_update in gradients[:saved_after]:
            take_update(one, buckets, of_update, comm)
        other = build(name, warmup_updates=2)
        other.load_state_dict(one.state_dict())
        other.load_rank_state_dict(one.rank_state_dict())
        for of_update in gradients[saved_after:]:
            for left, right in zip(take_update(one, buckets, of_update, comm), take_update(other, buckets, of_update, comm), strict=True):
                assert torch.equal(left.result, right.result)
                assert torch.equal(left.residual_after, right.residual_after)

    run_threads(size, work)


@pytest.mark.parametrize("name", [name for name in COMPRESSORS if name != "none"])
def test_what_is_left_out_comes_later(name):
    """The same gradient again and again: the mean of the results comes near it, as error feedback promises."""

    def work(comm: ThreadComm) -> float:
        buckets = buckets_of([(16, 24), (50,)])
        compressor = build(name, warmup_updates=0)
        gradients = [torch.randn(bucket.flat.numel(), generator=torch.Generator().manual_seed(comm.rank())) for bucket in buckets]
        total = sum(take_update(compressor, buckets, gradients, comm)[0].result for _ in range(150)) / 150
        true = sum(torch.randn(buckets[0].flat.numel(), generator=torch.Generator().manual_seed(rank)) for rank in range(comm.size()))
        return float((total - true).norm() / true.norm())

    assert max(run_threads(2, work)) < 0.2


@pytest.mark.parametrize("name", COMPRESSORS)
def test_one_worker_is_a_law_abiding_size_and_sends_nothing(name):
    def work(comm: ThreadComm) -> int:
        compressor = build(name, warmup_updates=0)
        buckets = buckets_of([(8, 8), (3,)])
        before = flat_residual(compressor, buckets[0])
        assert not before.any()
        return take_update(compressor, buckets, [torch.randn(bucket.flat.numel()) for bucket in buckets], comm)[0].declared_bytes

    assert run_threads(1, work) == [0]
