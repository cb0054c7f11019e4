"""`auto`: from what workers measure to one choice that all of them make."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import buckets_of, check_conservation, check_same_bits, take_update
from threads import ThreadComm, run_threads

from horoyolo.compression import policy
from horoyolo.compression.build import COMPRESSORS, build_compressor
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.policy import LOOK_EVERY, Auto, Choice, Cost, Link, Switch, Trials, measure_cost, predicted_tail_s
from horoyolo.config import Comms

BOTH = (False, True)
SETTINGS = Comms(compression="auto", warmup_updates=4, int8_block=64, onebit_block=64, topk_ratio=0.1, powersgd_rank=2)


def update(compressor: Auto, comm: ThreadComm, tail_s: float, wait_s: float) -> None:
    buckets = update.buckets.setdefault(comm.rank(), buckets_of([(8, 8)]))
    take_update(compressor, buckets, [torch.ones(64)], comm)
    compressor.measured(tail_s, wait_s, comm)


update.buckets = {}  # type: ignore[attr-defined]


@pytest.fixture
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of 1 MB/s and 1 ms, and codecs without cost: what is predicted then depends on bytes alone."""
    monkeypatch.setattr(policy, "probe_link", lambda comm: Link(1e-3, 1e6))
    wire_bytes = {"none": 4_000_000, "bf16": 2_000_000, "fp16": 2_000_000, "int8": 1_000_000, "onebit": 130_000, "topk": 100_000, "powersgd": 90_000}
    monkeypatch.setattr(Auto, "_probe_costs", lambda self, comm: {name: Cost(0.0, wire_bytes[name]) for name in self._makers})


def drive(comm: ThreadComm, tails_s: dict[str, float], updates: int, compressor: Auto | None = None) -> tuple[Auto, list[Choice]]:
    """Updates that take as long as ``tails_s`` says of the entry in use (a little more on later ranks, a little less when overlapped)."""
    compressor = compressor or build_compressor(SETTINGS, BOTH)
    seen = []
    for _ in range(updates):
        choice = Choice(compressor._choice.entry, compressor.overlap())
        seen.append(choice)
        tail_s = tails_s[choice.entry] * (0.9 if choice.overlap else 1.0) + 0.001 * comm.rank()
        update(compressor, comm, tail_s, tail_s - 0.05)
    return compressor, seen


@pytest.mark.parametrize("size", [2, 3])
def test_all_workers_settle_on_the_quickest_within_fifty_updates(known_costs, size):
    tails_s = {"none": 4.0, "bf16": 2.0, "fp16": 2.1, "int8": 1.1, "onebit": 0.3, "topk": 0.25, "powersgd": 0.2}
    seen = run_threads(size, lambda comm: drive(comm, tails_s, 60)[1])
    assert all(other == seen[0] for other in seen)
    assert set(seen[0][50:]) == {Choice("powersgd", True)}
    assert [choice.entry for choice in seen[0][:4]] == ["none"] * 4
    assert "none" not in [choice.entry for choice in seen[0][4:]], "one plain update costs as much as twenty others: predicted, not tried again"


def test_plain_is_kept_where_nothing_is_quicker(known_costs, monkeypatch):
    monkeypatch.setattr(policy, "probe_link", lambda comm: Link(1e-4, 1e12))
    seen = run_threads(2, lambda comm: drive(comm, dict.fromkeys(COMPRESSORS, 0.1) | {"none": 0.101}, 60)[1])
    assert {choice.entry for choice in seen[0][55:]} == {"none"}


def test_a_job_that_changed_is_looked_at_again(known_costs):
    fast = dict.fromkeys(COMPRESSORS, 1.0) | {"powersgd": 0.2}
    changed = dict.fromkeys(COMPRESSORS, 1.0) | {"powersgd": 2.0, "topk": 0.1}

    def work(comm: ThreadComm) -> tuple[Choice, Choice]:
        compressor, seen = drive(comm, fast, 60)
        _, later = drive(comm, changed, LOOK_EVERY + 60, compressor)
        return seen[-1], later[-1]

    before, after = run_threads(2, work)[0]
    assert before.entry == "powersgd"
    assert after.entry == "topk"


def test_a_job_of_another_size_is_looked_at_again(known_costs):
    tails_s = dict.fromkeys(COMPRESSORS, 1.0) | {"powersgd": 0.2}
    grown = [run_threads(1, lambda comm: drive(comm, tails_s, 3)[0])[0] for _ in range(2)]
    shrunk = run_threads(3, lambda comm: drive(comm, tails_s, 60)[0])[:2]
    for compressors in (grown, shrunk):
        seen = run_threads(2, lambda comm, compressors=compressors: drive(comm, tails_s, 60, compressors[comm.rank()])[1])
        assert "none" in [choice.entry for choice in seen[0][:5]]
        assert seen[0][-1] == seen[1][-1] == Choice("powersgd", True)


def test_a_fixed_entry_chooses_when_its_buckets_leave(known_costs):
    def work(comm: ThreadComm) -> list[Choice]:
        return drive(comm, {"none": 1.0}, 20, build_compressor(Comms(), BOTH))[1]

    seen = run_threads(2, work)[0]
    assert set(seen[15:]) == {Choice("none", True)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 6))
def test_trials_end_and_find_the_quickest(tails_s, rounds):
    choices = {Choice(str(index), False): tail_s for index, tail_s in enumerate(tails_s)}
    trials = Trials(list(choices), rounds)
    taken = 0
    while (choice := trials.next()) is not None:
        trials.record(choice, choices[choice])
        taken += 1
    assert taken <= rounds * len(tails_s)
    assert choices[trials.best()] <= policy.AS_QUICK * min(tails_s)


def test_the_most_faithful_of_equals_is_taken():
    trials = Trials([Choice("none", False), Choice("powersgd", False)], 2)
    while (choice := trials.next()) is not None:
        trials.record(choice, 1.0 if choice.entry == "none" else 0.99)
    assert trials.best().entry == "none"


def test_prediction_follows_the_model():
    link, cost = Link(0.01, 1e6), Cost(codec_s=0.1, wire_bytes=2_000_000)
    assert predicted_tail_s(Choice("x", False), cost, link, backward_s=1.0) == pytest.approx(1.0 + 0.1 + 2.01)
    assert predicted_tail_s(Choice("x", True), cost, link, backward_s=1.0) == pytest.approx(0.5 + 0.1 + 2.01)
    assert predicted_tail_s(Choice("x", True), cost, link, backward_s=10.0) == pytest.approx(10.1)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_measured_costs_are_those_of_a_real_update(name, size):
    """Without a network the bytes are what an update of equal workers sends, and the gradients are left alone."""
    buckets = buckets_of([(40, 30), (50,)])
    for bucket in buckets:
        bucket.flat.copy_(torch.randn(bucket.flat.numel(), generator=torch.Generator().manual_seed(0)))
    before = [bucket.flat.clone() for bucket in buckets]
    cost = measure_cost(COMPRESSORS[name](Comms(warmup_updates=0)), buckets, policy._EchoComm(size))
    assert all(torch.equal(bucket.flat, flat) for bucket, flat in zip(buckets, before, strict=True))
    assert cost.wire_bytes > 0
    assert (cost.codec_s > 0) == (name != "none")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(size=st.integers(1, 4), entries=st.lists(st.sampled_from(list(COMPRESSORS)), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_nothing_is_lost_when_the_way_to_sum_changes(size, entries, seed):
    def work(comm: ThreadComm) -> list:
        steady = Comms(warmup_updates=0, int8_block=64, onebit_block=64, topk_ratio=0.1, powersgd_rank=2)
        switch = Switch({name: (lambda name=name: COMPRESSORS[name](steady)) for name in COMPRESSORS})
        compressor, buckets = ErrorFeedback(switch), buckets_of([(12, 9, 3, 3), (70,)])
        generator = torch.Generator().manual_seed(10 * seed + comm.rank())
        rounds = []
        for entry in entries:
            switch.current = entry
            rounds += take_update(compressor, buckets, [torch.randn(bucket.flat.numel(), generator=generator) for bucket in buckets], comm)
        return rounds

    for rounds in zip(*run_threads(size, work), strict=True):
        check_same_bits(list(rounds))
        check_conservation(list(rounds))
