"""The laws of the contract over every entry of the table, on one to four workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import KINDS, Round, buckets_of, check_conservation, check_same_bits, flat_residual, take_update, values
from threads import ThreadComm, run_threads

from horoyolo.compression import policy
from horoyolo.compression.build import COMPRESSORS, build_compressor
from horoyolo.compression.policy import Auto, Choice
from horoyolo.config import Comms
from horoyolo.distributed.buckets import Bucket

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 700)),
        st.tuples(st.integers(1, 48), st.integers(1, 48)),
        st.tuples(st.integers(1, 48), st.integers(1, 24), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    ),
    min_size=1,
    max_size=5,
)
KIND = st.sampled_from(KINDS)
MOST_WORKERS = 4
# What the workers send in an update: all the same, or each its own; one without images sends zeros.
KINDS_OF_WORKERS = st.one_of(KIND.map(lambda kind: (kind,) * MOST_WORKERS), st.tuples(*[KIND] * MOST_WORKERS))
ONE_SENDS = [("zero", "normal", "zero", "zero"), ("huge", "zero", "zero", "zero"), ("zero", "zero", "mixed", "zero")]
ONE_SENDS_NOTHING = [("normal", "zero", "normal", "mixed"), ("zero", "sparse", "tiny", "equal"), ("mixed", "normal", "zero", "huge")]
WORKERS = st.integers(1, MOST_WORKERS)


def build(name: str, warmup_updates: int = 1) -> Any:
    return build_compressor(Comms(compression=name, warmup_updates=warmup_updates, int8_block=64, onebit_block=64, topk_ratio=0.1, powersgd_rank=2))


def worker(name: str, shapes: list, channels_last: bool, kinds: list[tuple[str, ...]], seed: int) -> Any:
    """What a worker does in the laws below: updates with gradients of a kind for each worker, that differ between workers."""

    def work(comm: ThreadComm) -> tuple[list[list[Round]], int]:
        compressor = build(name)
        buckets = buckets_of(shapes, channels_last, bucket_mb=0.004)
        generator = torch.Generator().manual_seed(1000 * seed + comm.rank())
        rounds = []
        for kind in (of_workers[comm.rank()] for of_workers in kinds):
            rounds.append(take_update(compressor, buckets, [values(kind, bucket.flat.numel(), generator) for bucket in buckets], comm))
        return rounds, comm.sent_bytes

    return work


@pytest.mark.parametrize("name", COMPRESSORS)
@settings(max_examples=25, deadline=None, derandomize=True)
@example(size=2, shapes=[(24, 24), (700,)], channels_last=False, kinds=[*ONE_SENDS_NOTHING, *ONE_SENDS], seed=0)
@example(size=3, shapes=[(24, 24), (24, 20, 3, 3), (700,)], channels_last=True, kinds=[*ONE_SENDS, *ONE_SENDS_NOTHING], seed=1)
@example(size=4, shapes=[(24, 24), (700,)], channels_last=False, kinds=[*ONE_SENDS_NOTHING, *ONE_SENDS], seed=2)
@given(size=WORKERS, shapes=SHAPES, channels_last=st.booleans(), kinds=st.lists(KINDS_OF_WORKERS, min_size=1, max_size=5), seed=st.integers(0, 99))
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


BAD = {5: float("nan"), 9: float("inf"), 20: -float("inf")}  # by update, from one worker


@pytest.fixture
def every_entry_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` finds all entries worth trying, and equal."""
    for name in ("WORTH_TRYING", "BEHIND", "AS_QUICK", "MOST_CHOICES"):
        monkeypatch.setattr(policy, name, 10**9)


def take_auto_updates(compressor: Auto, buckets: list[Bucket], updates: int, comm: ThreadComm) -> list[tuple[str, list[Round]]]:
    """Updates with measurements as training takes them: the entry and what this worker saw of each bucket, declared bytes counted."""
    generator = torch.Generator().manual_seed(comm.rank())
    seen = []
    for index in range(updates):
        kind = "normal" if index in BAD else KINDS[(index + comm.rank()) % len(KINDS)]
        gradients = [values(kind, bucket.flat.numel(), generator) for bucket in buckets]
        if index in BAD and comm.rank() == index % comm.size():
            gradients[0][index] = BAD[index]
        entry, before, sent_bytes = compressor._choice.entry, compressor.state_dict(), comm.sent_bytes
        rounds = take_update(compressor, buckets, gradients, comm)
        assert sum(round_.declared_bytes for round_ in rounds) == comm.sent_bytes - sent_bytes
        if index in BAD:
            assert differences(compressor.state_dict(), before) == []
        else:
            compressor.measured(0.2, 0.1, comm)
        seen.append((entry, rounds))
    return seen


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_auto_obeys_the_laws_of_all_that_it_tries(every_entry_in_turn, size):
    shapes = [(24, 24), (24, 9, 3, 3), (70,)]
    seen = run_threads(size, lambda comm: take_auto_updates(build("auto", 3), buckets_of(shapes, True, bucket_mb=0.002), 60, comm))
    assert {entry for entry, _ in seen[0]} == (set(COMPRESSORS) if size > 1 else {"none"})
    for index, of_workers in enumerate(zip(*seen, strict=True)):
        assert len({entry for entry, _ in of_workers}) == 1
        for rounds in zip(*(rounds for _, rounds in of_workers), strict=True):
            if index not in BAD:
                check_same_bits(list(rounds))
                check_conservation(list(rounds))
            else:
                assert all(torch.equal(round_.residual_before, round_.residual_after) for round_ in rounds)
        first = [round_.result for round_ in of_workers[0][1]]
        assert all(torch.isfinite(result).all() for result in first) == (index not in BAD)


@pytest.mark.parametrize("updates", [2, 12, 33])
def test_auto_goes_on_from_its_saved_state(every_entry_in_turn, updates):
    """What was measured is not in the state: it measures anew. All that its entries share, and what was not sent, is."""

    def work(comm: ThreadComm) -> None:
        one, other, buckets = build("auto", 3), build("auto", 3), buckets_of([(24, 24), (70,)])
        take_auto_updates(one, buckets, updates, comm)
        other.load_state_dict(one.state_dict())
        other.load_rank_state_dict(one.rank_state_dict())
        assert differences(other.state_dict(), one.state_dict()) == []
        assert other._choice.entry == "none"
        generator = torch.Generator().manual_seed(100 + comm.rank())
        for entry in COMPRESSORS:
            one._choice = other._choice = Choice(entry, True)
            gradients = [torch.randn(bucket.flat.numel(), generator=generator) for bucket in buckets]
            for left, right in zip(take_update(one, buckets, gradients, comm), take_update(other, buckets, gradients, comm), strict=True):
                assert torch.equal(left.result, right.result)
                assert torch.equal(left.residual_after, right.residual_after)

    run_threads(2, work)


def differences(left: Any, right: Any) -> list[str]:
    """What differs in nested dictionaries of tensors and numbers."""
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [str(left.keys() ^ right.keys())]
        return [f"{key}.{found}" for key in left for found in differences(left[key], right[key])]
    return [] if (torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right) else [f"{left} {right}"]
