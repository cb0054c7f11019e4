"""`auto`: from what workers measure to one choice that all of them make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import buckets_of, check_conservation, check_same_bits, take_update
from threads import ThreadComm, run_threads

from horoyolo.compression import policy, probe
from horoyolo.compression.build import COMPRESSORS, build_compressor
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.policy import LOOK_EVERY, Auto, Choice, Switch, Trials, predicted_tail_s
from horoyolo.compression.probe import Cost, EchoComm, Link, measure_cost, probe_link
from horoyolo.config import Comms

BOTH = (False, True)
SETTINGS = Comms(compression="auto", warmup_updates=4, int8_block=64, onebit_block=64, topk_ratio=0.1, powersgd_rank=2)


def update(compressor: Auto, comm: ThreadComm, tail_s: float, backward_s: float) -> None:
    buckets = update.buckets.setdefault(comm.rank(), buckets_of([(8, 8)]))
    take_update(compressor, buckets, [torch.ones(64)], comm)
    compressor.measured(tail_s, backward_s, comm)


update.buckets = {}  # type: ignore[attr-defined]


def even_link(latency_s: float, bytes_per_s: float, probe_s: float = 0.0) -> Link:
    """One that a byte takes as long on whatever the collective is."""
    return Link(latency_s, bytes_per_s, bytes_per_s, probe_s)


@pytest.fixture
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of 1 MB/s and 1 ms, and codecs without cost: what is predicted then depends on bytes alone."""
    monkeypatch.setattr(policy, "probe_link", lambda comm, device: even_link(1e-3, 1e6))
    wire_bytes = {"none": 4_000_000, "bf16": 2_000_000, "fp16": 2_000_000, "int8": 1_000_000, "onebit": 130_000, "topk": 100_000, "powersgd": 90_000}
    monkeypatch.setattr(policy, "probe_costs", lambda makers, buckets, comm: {name: Cost(0.0, wire_bytes[name], 0) for name in makers})


def drive(comm: ThreadComm, tails_s: dict[str, float], updates: int, compressor: Auto | None = None) -> tuple[Auto, list[Choice]]:
    """Updates that take as long as ``tails_s`` says of the entry in use (a little more on later ranks, a little less when overlapped)."""
    compressor = compressor or build_compressor(SETTINGS, BOTH)
    seen = []
    for _ in range(updates):
        choice = Choice(compressor._choice.entry, compressor.overlap())
        seen.append(choice)
        tail_s = tails_s[choice.entry] * (0.9 if choice.overlap else 1.0) + 0.001 * comm.rank()
        update(compressor, comm, tail_s, 0.05)
    return compressor, seen


@pytest.mark.parametrize("size", [2, 3])
def test_all_workers_settle_on_the_quickest_within_fifty_updates(known_costs, size):
    tails_s = {"none": 4.0, "bf16": 2.0, "fp16": 2.1, "int8": 1.1, "onebit": 0.3, "topk": 0.25, "powersgd": 0.2}
    seen = run_threads(size, lambda comm: drive(comm, tails_s, 60)[1])
    assert all(other == seen[0] for other in seen)
    assert set(seen[0][50:]) == {Choice("powersgd", True)}
    assert [choice.entry for choice in seen[0][:4]] == ["none"] * 4
    assert "none" not in [choice.entry for choice in seen[0][4:]], "one plain update costs as much as twenty others: predicted, not tried again"


@pytest.mark.parametrize(("compressor", "tries"), [(Comms(), False), (Comms(), True), (SETTINGS, True)])
def test_what_is_being_tried_is_not_settled(known_costs, compressor, tries):
    def work(comm: ThreadComm) -> list[tuple[bool, Choice]]:
        auto, seen = build_compressor(compressor, BOTH if tries else (True,)), []
        for _ in range(60):
            seen.append((auto.settled(), drive(comm, dict.fromkeys(COMPRESSORS, 1.0) | {"topk": 0.5}, 1, auto)[1][0] if tries else None))
        return seen

    seen = run_threads(2, work)[0]
    settled = [is_settled for is_settled, _ in seen]
    began = settled.index(True)
    assert settled == [False] * began + [True] * (60 - began)
    assert (began > 0) == tries
    assert len({choice for _, choice in seen[began:]}) == 1


def test_plain_is_kept_where_nothing_is_quicker(known_costs, monkeypatch):
    monkeypatch.setattr(policy, "probe_link", lambda comm, device: even_link(1e-4, 1e12))
    seen = run_threads(2, lambda comm: drive(comm, dict.fromkeys(COMPRESSORS, 0.1) | {"none": 0.101}, 60)[1])
    assert {choice.entry for choice in seen[0][55:]} == {"none"}


def test_plain_is_kept_where_only_the_model_says_that_others_are_quicker(known_costs):
    """Predicted 4 s against 0.1; measured it is the quickest, if only by 2 %."""
    tails_s = dict.fromkeys(COMPRESSORS, 1.02) | {"none": 1.0}
    seen = run_threads(2, lambda comm: drive(comm, tails_s, 60)[1])
    assert {choice.entry for choice in seen[0][50:]} == {"none"}
    quicker = run_threads(2, lambda comm: drive(comm, tails_s | {"onebit": 0.95}, 60)[1])
    assert {choice.entry for choice in quicker[0][50:]} == {"onebit"}


def test_what_is_known_of_plain_rules_it_out_only_where_it_is_far_behind():
    plain, other = Choice("none", False), Choice("int8", False)
    for known_s, remains in ((1.6, False), (1.4, True)):  # a slow start, say
        trials = Trials([plain, other], 4, {plain: [known_s, known_s]})
        for _ in range(2):
            assert trials.next() == other
            trials.record(other, 1.0)
        assert (plain in trials.times_s) == remains
    trials.record(plain, 1.3)
    trials.record(other, 1.0)
    assert trials.times_s == {other: [1.0, 1.0, 1.0]}
    assert trials.dropped_s == {plain: [1.4, 1.4, 1.3]}


@pytest.mark.parametrize("overlaps", [BOTH, (True,)])
def test_backward_is_that_of_the_slowest_worker_wherever_buckets_leave(known_costs, monkeypatch, overlaps):
    """A worker that waits long for the others' sums, a third of its tail, has the shorter backward. On GPUs nothing leaves after backward."""
    seen = []

    def predict(choice: Choice, cost: Cost, link: Link, backward_s: float) -> float:
        seen.append(backward_s)
        return predicted_tail_s(choice, cost, link, backward_s)

    monkeypatch.setattr(policy, "predicted_tail_s", predict)

    def work(comm: ThreadComm) -> None:
        compressor = build_compressor(SETTINGS, overlaps)
        for _ in range(4):
            update(compressor, comm, 3.0, 2.0 if comm.rank() else 1.0)

    run_threads(2, work)
    assert set(seen) == {2.0}


def test_plain_sums_that_hide_behind_backward_are_kept(known_costs, monkeypatch):
    monkeypatch.setattr(policy, "probe_link", lambda comm, device: even_link(1e-3, 4e6))

    def work(comm: ThreadComm) -> list[str]:
        compressor, entries = build_compressor(SETTINGS, (True,)), []
        for _ in range(60):
            entries.append(compressor._choice.entry)
            update(compressor, comm, 4.0, 3.9)
        return entries

    entries = run_threads(2, work)[0]
    assert set(entries[50:]) == {"none"}


@pytest.mark.parametrize("name", ["onebit", "powersgd", "topk", "int8"])
def test_a_fixed_entry_is_looked_at_when_its_warm_up_is_over(known_costs, name):
    """Plain sums want to leave during backward here, the entry after it."""
    warmup_updates = 10 if name != "int8" else 0

    def work(comm: ThreadComm) -> list[Choice]:
        compressor, seen = build_compressor(Comms(compression=name, warmup_updates=10), BOTH), []
        for index in range(40):
            seen.append(compressor._choice)
            quick = compressor.overlap() == (index < warmup_updates)
            update(compressor, comm, 1.0 if quick else 1.5, 0.5)
        return seen

    seen = run_threads(2, work)[0]
    assert set(seen[warmup_updates + 1 + 2 * policy.ROUNDS :]) == {Choice(name, False)}


def test_a_link_that_became_fast_is_noticed_though_the_tail_is_the_same(known_costs, monkeypatch):
    rates = {"bytes_per_s": 1e6}
    monkeypatch.setattr(policy, "probe_link", lambda comm, device: even_link(1e-3, rates["bytes_per_s"]))
    slow = dict.fromkeys(COMPRESSORS, 12.0) | {"none": 40.0, "powersgd": 8.0}
    fast = slow | {"none": 7.0}

    def work(comm: ThreadComm) -> tuple[set, set]:
        compressor, seen = drive(comm, slow, 60)
        for _ in range(2):
            seen += drive(comm, slow, LOOK_EVERY, compressor)[1]
        comm.allreduce_async(torch.zeros(1), "link").wait()
        rates["bytes_per_s"] = 1e8
        _, later = drive(comm, fast, 2 * LOOK_EVERY + 60, compressor)
        return {choice.entry for choice in seen[50:]}, {choice.entry for choice in later[-10:]}

    assert run_threads(2, work)[0] == ({"powersgd"}, {"none"})


def test_where_one_worker_has_given_way_for_good_none_leaves_during_backward_again(known_costs):
    """Its threads would be starved: what they took would say nothing of the link."""
    tails_s = {name: 1.0 + number for number, name in enumerate(reversed(COMPRESSORS))}

    def work(comm: ThreadComm) -> tuple[list[Choice], ...]:
        compressor, before = drive(comm, tails_s, 100)
        comm.is_starved = comm.rank() == 1
        _, after = drive(comm, {name: 2 * tail_s for name, tail_s in tails_s.items()}, 2 * LOOK_EVERY + 60, compressor)
        assert compressor.settled()
        compressor.reset()
        return before, after[2 * LOOK_EVERY :], drive(comm, tails_s, 60, compressor)[1]

    seen = run_threads(2, work)
    assert seen[0] == seen[1]
    before, after, anew = ([choice.overlap for choice in choices] for choices in seen[0])
    assert any(before)
    assert not any(after)
    assert any(anew), "other threads move the bytes of other generations"


def test_who_has_one_choice_left_looks_no_more(caplog):
    def work(comm: ThreadComm) -> bool:
        compressor, _ = drive(comm, {"none": 1.0}, 40, build_compressor(Comms(), BOTH))
        comm.is_starved = True
        drive(comm, {"none": 2.0}, LOOK_EVERY + 20, compressor)
        with caplog.at_level("INFO", "horoyolo"):
            drive(comm, {"none": 6.0}, 4 * LOOK_EVERY, compressor)
        return compressor.settled()

    assert all(run_threads(2, work))
    assert "looking again" not in caplog.text


@pytest.mark.parametrize(("bytes_per_s", "largest"), [(2e6, 1 << 20), (1e8, 1 << 22), (1e11, 1 << 24)])
def test_a_fast_link_is_probed_with_more_bytes(monkeypatch, bytes_per_s, largest):
    """Few would say little beside a latency of 10 ms that varies."""
    sent = []

    def takes_s(comm: ThreadComm, tensor: torch.Tensor) -> float:
        sent.append(4 * tensor.numel())
        return 0.01 + 4 * tensor.numel() / bytes_per_s

    monkeypatch.setattr(probe, "_allreduce_s", takes_s)
    monkeypatch.setattr(probe, "_alltoall_s", lambda comm, part, device: 0.01 + 3 * 4 * part / bytes_per_s)
    link = run_threads(2, lambda comm: probe_link(comm, torch.device("cpu")))[0]
    assert max(sent) == largest
    assert link.ring_bytes_per_s == pytest.approx(bytes_per_s, rel=1e-4)
    assert link.alltoall_bytes_per_s == pytest.approx(bytes_per_s / 3, rel=1e-4)
    assert link.latency_s == pytest.approx(0.01, rel=0.01)
    assert link.probe_s > 0


def test_probes_of_the_link_take_one_per_cent_at_most(known_costs, monkeypatch):
    probed = []
    link = even_link(1e-3, 4e6, probe_s=1.6)
    monkeypatch.setattr(policy, "probe_link", lambda comm, device: probed.append(comm.rank()) or link)
    tails_s = dict.fromkeys(COMPRESSORS, 10.0) | {"powersgd": 1.0}
    updates = 500
    run_threads(2, lambda comm: drive(comm, tails_s, updates))
    assert 2 <= probed.count(0) - 1 <= 0.01 * updates * 0.9 / link.probe_s


@pytest.mark.parametrize(("factor", "again"), [(1.15, False), (1.4, True), (0.65, True)])
def test_a_tail_that_changed_by_more_than_a_quarter_is_noticed(known_costs, factor, again):
    tails_s = dict.fromkeys(COMPRESSORS, 4.0) | {"powersgd": 1.0}
    changed = tails_s | {"powersgd": factor}

    def work(comm: ThreadComm) -> set:
        compressor, _ = drive(comm, tails_s, 60)
        return {choice.entry for choice in drive(comm, changed, LOOK_EVERY + 10, compressor)[1]}

    assert run_threads(2, work)[0] >= {"none"} if again else run_threads(2, work)[0] == {"powersgd"}


def test_looks_that_change_nothing_come_less_and_less_often(known_costs):
    """A machine that is busy every now and then."""
    tails_s = dict.fromkeys(COMPRESSORS, 4.0) | {"powersgd": 1.0}

    def work(comm: ThreadComm) -> int:
        compressor, plain = build_compressor(SETTINGS, BOTH), 0
        for turn in range(24):
            busy = 1.5 if turn % 2 else 1.0
            seen = drive(comm, {entry: tail_s * busy for entry, tail_s in tails_s.items()}, LOOK_EVERY, compressor)[1]
            plain += sum(choice.entry == "none" for choice in seen)
        return plain

    assert run_threads(2, work)[0] <= 4 * 6


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
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.sampled_from([2, 4, 6]))
def test_trials_end_and_find_the_quickest(tails_s, rounds):
    choices = {Choice(str(index), False): tail_s for index, tail_s in enumerate(tails_s)}
    trials = Trials(list(choices), rounds)
    taken = 0
    while (choice := trials.next()) is not None:
        trials.record(choice, choices[choice])
        taken += 1
    assert taken <= rounds * len(tails_s)
    assert {len(times) for times in trials.times_s.values()} <= set(range(rounds, taken + 1, 2))
    assert choices[trials.best()] <= policy.AS_QUICK * min(tails_s)


def test_trials_of_those_that_fell_behind_go_to_those_that_are_close():
    tails_s = {Choice("none", False): 2.0, Choice("int8", False): 1.5, Choice("topk", False): 1.02, Choice("powersgd", False): 1.0}
    trials = Trials(list(tails_s), 6)
    while (choice := trials.next()) is not None:
        trials.record(choice, tails_s[choice])
    assert {choice.entry: len(times) for choice, times in trials.times_s.items()} == {"topk": 10, "powersgd": 10}


def test_the_most_faithful_of_equals_is_taken():
    trials = Trials([Choice("none", False), Choice("powersgd", False)], 2)
    while (choice := trials.next()) is not None:
        trials.record(choice, 1.0 if choice.entry == "none" else 0.99)
    assert trials.best().entry == "none"


@pytest.mark.parametrize("entry", ["none", "powersgd"])
def test_of_an_entry_the_quicker_time_to_leave_is_taken(entry):
    """Both have the same bits: there is nothing to give a few per cent for."""
    tails_s = {Choice(entry, False): 1.0, Choice(entry, True): 0.97, Choice("topk", True): 0.96}
    trials = Trials(list(tails_s), 2)
    while (choice := trials.next()) is not None:
        trials.record(choice, tails_s[choice])
    assert trials.best() == Choice(entry, True)


def test_prediction_follows_the_model():
    link, cost = even_link(0.01, 1e6), Cost(codec_s=0.1, wire_bytes=2_000_000, alltoall_bytes=1_000_000)
    assert predicted_tail_s(Choice("x", False), cost, link, backward_s=1.0) == pytest.approx(1.0 + 0.1 + 2.01)
    assert predicted_tail_s(Choice("x", True), cost, link, backward_s=1.0) == pytest.approx(0.5 + 0.1 + 2.01)
    assert predicted_tail_s(Choice("x", True), cost, link, backward_s=10.0) == pytest.approx(10.1)
    shared = Link(0.01, 1e6, 0.25e6)
    assert predicted_tail_s(Choice("x", False), cost, shared, backward_s=1.0) == pytest.approx(1.0 + 0.1 + 0.01 + 1.0 + 4.0)


@pytest.mark.parametrize("size", [2, 5])
def test_what_goes_straight_to_its_receivers_is_told_from_what_goes_around_a_ring(size):
    """One byte for each number, a part of them to each worker."""
    buckets = buckets_of([(size << 16,)])
    costs = {name: measure_cost(entry.make(Comms(warmup_updates=0)), buckets, EchoComm(size)) for name, entry in COMPRESSORS.items()}
    assert {name for name, cost in costs.items() if cost.alltoall_bytes == 0} == {"none", "powersgd"}
    assert costs["int8"].alltoall_bytes == pytest.approx((size - 1) << 16, rel=0.05)
    assert all(cost.alltoall_bytes < cost.wire_bytes for cost in costs.values())


def test_what_a_shared_link_slows_down_is_predicted_no_shorter_than_it_will_be(known_costs, monkeypatch):
    """A host whose workers share its way to others: what goes around a ring crosses it once, an alltoall once for each pair of workers."""
    monkeypatch.setattr(policy, "probe_link", lambda comm, device: Link(1e-3, 1e6, 0.3e6))
    wire_bytes = {"none": 4_000_000, "int8": 100_000, "powersgd": 160_000}
    costs = {name: Cost(0.0, num_bytes, num_bytes // 2 if name == "int8" else 0) for name, num_bytes in wire_bytes.items()}
    far = Cost(0.0, 10_000_000, 0)
    monkeypatch.setattr(policy, "probe_costs", lambda makers, buckets, comm: {name: costs.get(name, far) for name in makers})
    tails_s = dict.fromkeys(COMPRESSORS, 4.0) | {"int8": 0.4, "powersgd": 0.3}
    seen = run_threads(2, lambda comm: drive(comm, tails_s, 60)[1])
    assert seen[0][-1].entry == "powersgd"


def test_a_worker_that_is_late_by_turns_is_no_change(known_costs):
    """In each update one of five is late: the median of the latest is twice what any of them takes by its own median."""

    def work(comm: ThreadComm) -> int:
        compressor, looks = build_compressor(Comms(), BOTH), 0
        for index in range(LOOK_EVERY * 4):
            was_settled = compressor.settled()
            update(compressor, comm, 2.0 if index % 5 == comm.rank() else 1.0, 0.05)
            looks += was_settled and not compressor.settled()
        return looks

    assert run_threads(5, work) == [0] * 5


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_measured_costs_are_those_of_a_real_update(name, size):
    """Without a network the bytes are about what an update of equal workers sends, and the gradients are left alone."""
    settings, gradient = Comms(warmup_updates=0), torch.randn(300 * 400 + 500, generator=torch.Generator().manual_seed(0))

    def work(comm: ThreadComm) -> int:
        compressor, buckets = build_compressor(replace(settings, compression=name)), buckets_of([(300, 400), (500,)])
        for _ in range(2):
            take_update(compressor, buckets, [gradient], comm)
        return sum(round_.declared_bytes for _ in range(2) for round_ in take_update(compressor, buckets, [gradient], comm)) // 2

    buckets = buckets_of([(300, 400), (500,)])
    buckets[0].flat.copy_(gradient)
    cost = measure_cost(COMPRESSORS[name].make(settings), buckets, EchoComm(size))
    assert torch.equal(buckets[0].flat, gradient)
    assert cost.wire_bytes == pytest.approx(max(run_threads(size, work)), rel=0.15)
    assert (cost.codec_s > 0) == (name != "none")


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("size", [2, 3, 5, 11])
@pytest.mark.parametrize("short", [0, 100, 255])
def test_costs_are_measured_where_parts_of_workers_are_not_equally_long(name, size, short):
    """What an owner has more than others is not selected: it would be looked for in the parts of others too."""
    buckets = buckets_of([(4 * 4096 * size - 100 - short,), (100,)])
    buckets[0].flat.copy_(torch.randn(buckets[0].flat.numel(), generator=torch.Generator().manual_seed(short)))
    assert measure_cost(COMPRESSORS[name].make(Comms(warmup_updates=0)), buckets, EchoComm(size)).wire_bytes > 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(size=st.integers(1, 4), entries=st.lists(st.sampled_from(list(COMPRESSORS)), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_nothing_is_lost_when_the_way_to_sum_changes(size, entries, seed):
    def work(comm: ThreadComm) -> list:
        steady = Comms(warmup_updates=0, int8_block=64, onebit_block=64, topk_ratio=0.1, powersgd_rank=2)
        switch = Switch({name: (lambda name=name: COMPRESSORS[name].make(steady)) for name in COMPRESSORS})
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
