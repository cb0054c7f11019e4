"""Which way to sum gives the shortest step on this job's machines and links: predicted from what they measure, then tried.

What is compared is the tail of an update: from the start of its last backward to its sums. Data, forward and the optimizer are the same for all.
A prediction chooses who is worth trying (on a slow link one plain update can cost as much as ten others); trials in turn, a few each, choose
among those, since no model knows how cores and network disturb each other. Plain sums take part whatever is predicted of them, with what they
took before others were tried: nothing else is chosen but what was measured to be quicker. All workers go by the same agreed figures.

A settled choice is looked at now and then: whether its tail has changed, and whether the link has, by the probe that the prediction went by. A
small payload's tail hardly shows that a slow link has become fast, and one plain update on a slow link costs as much as ten probes. The
probe takes one per cent of the time at most. Each look at everything that ends where it began doubles the time to the next: a machine that others
use now and then costs the job little.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Compressor, Lossy, MeasuringComm, Pending
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.probe import Cost, Link, agreed, probe_costs, probe_link

log = logging.getLogger("horoyolo")

WORTH_TRYING = 1.5  # predicted tail against the shortest predicted one
MOST_CHOICES = 6  # tried
BEHIND = 1.05  # a choice whose quickest trial is behind the leader's median by this is tried no more
AS_QUICK = 1.03  # of entries within this of the quickest the most faithful is taken: medians of so few trials differ by as much by chance
ROUNDS = 6  # trials of each choice, more where others fell behind; even, since updates of powersgd differ in turns
KNOWN = 2  # of the updates before trials that count as trials of plain sums
LOOK_EVERY = 50  # updates between two looks at a settled choice, at first
LOOK_AT_LEAST_EVERY = 32 * LOOK_EVERY
CHANGED = 0.25  # of the tail: a difference by which it is another job
PROBE_SHARE = 0.01  # of the time between two probes


class Choice(NamedTuple):
    """A way to sum, and whether buckets leave while backward runs."""

    entry: str
    overlap: bool

    def __str__(self) -> str:
        return f"{self.entry} {'during' if self.overlap else 'after'} backward"


class Switch(Lossy):
    """Several ways to sum, one at a time; what one leaves out the next one sends, since residuals do not belong to a way.

    Which is ``current`` is for others to say, and no part of the state.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Lossy]]):
        super().__init__()
        self.members = {name: make() for name, make in makers.items()}
        self.current = next(iter(self.members))

    @property
    def exact(self) -> bool:
        return self.members[self.current].exact

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> Pending:
        return self.members[self.current].start(bucket, comm, residual)

    def commit(self) -> None:
        self.members[self.current].commit()
        super().commit()

    def discard(self) -> None:
        self.members[self.current].discard()

    def reset(self) -> None:
        for member in self.members.values():
            member.reset()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "members": {name: member.state_dict() for name, member in self.members.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, of_member in state["members"].items():
            if name in self.members:
                self.members[name].load_state_dict(of_member)


class Trials:
    """Tries choices in turn, ``rounds`` (an even number) times each, and drops those that fall behind: what these leave of their trials goes to
    those that are hard to tell apart. All figures must be the same on all workers.

    Times that are ``known`` of some choices count as their first trials. They are from before the others': alone they show only who is far behind.
    """

    def __init__(self, choices: Sequence[Choice], rounds: int = ROUNDS, known: Mapping[Choice, list[float]] | None = None):
        self._known = known or {}
        self.times_s: dict[Choice, list[float]] = {choice: list(self._known.get(choice, ())) for choice in choices}
        self.dropped_s: dict[Choice, list[float]] = {}  # trials of those that fell behind
        self._most = rounds * len(choices)

    def next(self) -> Choice | None:
        """Whose turn it is; None: all trials are done."""
        choice = min(self.times_s, key=lambda choice: len(self.times_s[choice]))
        taken = {len(times) for times in self.times_s.values()}
        left = self._most - sum(len(times) for tried in (self.times_s, self.dropped_s) for times in tried.values())
        return None if len(taken) == 1 and taken.pop() % 2 == 0 and left < 2 * len(self.times_s) else choice

    def record(self, choice: Choice, tail_s: float) -> None:
        """Notes one trial; at the end of a round, from the second on, drops choices whose quickest trial is behind the leader's median."""
        self.times_s[choice].append(tail_s)
        tried = {len(times) for times in self.times_s.values()}
        if len(tried) == 1 and tried.pop() >= 2:
            leader_s = min(statistics.median(times) for times in self.times_s.values())
            behind = [choice for choice, times in self.times_s.items() if min(times) > self._margin(choice) * leader_s]
            self.dropped_s |= {choice: self.times_s.pop(choice) for choice in behind}

    def _margin(self, choice: Choice) -> float:
        return WORTH_TRYING if self.times_s[choice] == self._known.get(choice) else BEHIND

    def best(self) -> Choice:
        """Of the entries that are about as quick as the quickest, by medians, the first, where it is quickest: when to leave changes no bit."""
        medians = {choice: statistics.median(times) for choice, times in self.times_s.items()}
        entry = next(choice.entry for choice, median_s in medians.items() if median_s <= AS_QUICK * min(medians.values()))
        return min((choice for choice in medians if choice.entry == entry), key=medians.__getitem__)


def predicted_tail_s(choice: Choice, cost: Cost, link: Link, backward_s: float) -> float:
    """The tail of an update by a crude model: what leaves during backward hides behind its second half, where the first bucket is full."""
    net_s = link.time_s(cost.wire_bytes, cost.alltoall_bytes)
    if choice.overlap:
        return max(backward_s + cost.codec_s, backward_s / 2 + cost.codec_s + net_s)
    return backward_s + cost.codec_s + net_s


class Auto(Compressor):
    """Error feedback around the quickest of several ways to sum, chosen by measurement; looks again when the job changes.

    The first ``plain_updates`` are sent by the first entry: it is the plain one where there are several. One entry alone is looked at once it is
    past its own warm-up.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Lossy]], overlaps: Sequence[bool], plain_updates: int = 0):
        self._makers = makers
        first, *others = makers
        # One entry keeps its state as it does by itself: a checkpoint serves wherever buckets leave.
        self._switch = Switch(makers) if others else None
        self._feedback = ErrorFeedback(self._switch or makers[first]())
        self._all = [Choice(entry, overlap) for entry in makers for overlap in overlaps]
        self._plain_updates = plain_updates
        self._buckets: dict[str, Bucket] = {}
        self._size = 0
        self._forget()

    def _forget(self) -> None:
        """Workers that meet know nothing of each other's looks."""
        self._settled: Choice | None = None  # the outcome of the last look at everything
        self._look_every = LOOK_EVERY
        self._possible = self._all
        self._begin()

    def _begin(self) -> None:
        """Forgets everything measured."""
        self._plain = [choice for choice in self._possible if choice.entry == self._all[0].entry]
        self._to_know = KNOWN * len(self._plain) if self._switch is not None else 0  # plain updates to be measured, whenever
        self._choice = self._plain[0]
        self._trials: Trials | None = None
        self._plain_tails_s: dict[Choice, list[float]] = {choice: [] for choice in self._plain}
        self._plain_backward_s: dict[Choice, list[float]] = {choice: [] for choice in self._plain}
        self._plain_bytes = 0
        self._link: Link | None = None  # as it was probed last
        self._own_tails_s: dict[Choice, list[float]] = {choice: [] for choice in self._possible}  # this worker's, before a choice was settled
        self._settled_tails_s: list[float] = []
        self._reference_s = 0.0
        self._since_probe_s = 0.0

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        self._buckets[bucket.name] = bucket
        if self._switch is not None:
            self._switch.current = self._choice.entry
        return self._feedback.start(bucket, comm)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._buckets.values())).flat.device

    def commit(self) -> None:
        self._feedback.commit()

    def discard(self) -> None:
        self._feedback.discard()

    def reset(self) -> None:
        """Measures anew: newcomers know nothing of what was tried before."""
        self._feedback.reset()
        self._forget()

    def overlap(self) -> bool:
        return self._choice.overlap

    def settled(self) -> bool:
        return self._reference_s > 0

    def measured(self, tail_s: float, backward_s: float, comm: MeasuringComm) -> None:
        if comm.size() == 1:
            return
        if comm.size() != self._size:
            self._size = comm.size()
            self._forget()
        if self._trials is not None:
            self._try(self._trials, tail_s, comm)
        elif self._reference_s:
            if len(self._possible) > 1:  # or nothing else could come of it
                self._watch(tail_s, comm)
        else:
            self._measure_plain(tail_s, backward_s, comm)

    def _measure_plain(self, tail_s: float, backward_s: float, comm: Comm) -> None:
        self._own_tails_s[self._choice].append(tail_s)
        tail_s, backward_s = agreed([tail_s, backward_s], comm)
        self._plain_tails_s[self._choice].append(tail_s)
        self._plain_backward_s[self._choice].append(backward_s)
        done, lossy = sum(map(len, self._plain_tails_s.values())), self._feedback.lossy
        if done >= self._to_know and lossy.update >= self._plain_updates and lossy.warm:
            self._look(comm)
        else:
            self._choice = self._plain[done % len(self._plain)]

    def _look(self, comm: Comm) -> None:
        """Chooses whom to try."""
        choices, known = self._possible, {}
        if self._switch is not None:
            link, costs = probe_link(comm, self._device), probe_costs(self._makers, list(self._buckets.values()), comm)
            self._link, self._plain_bytes = link, costs[self._plain[0].entry].wire_bytes
            # The quicker, where buckets leave at both times: an exchange beside it slows backward down on a CPU.
            backward_s = min(statistics.median(times_s) for times_s in self._plain_backward_s.values())
            predicted = {choice: predicted_tail_s(choice, costs[choice.entry], link, backward_s) for choice in self._possible}
            in_order = sorted(self._possible, key=predicted.__getitem__)
            plain = min(self._plain, key=lambda choice: min(self._plain_tails_s[choice]))
            others = [choice for choice in in_order if choice != plain and predicted[choice] <= WORTH_TRYING * predicted[in_order[0]]]
            worth_trying = [plain, *others][:MOST_CHOICES]
            choices = [choice for choice in self._possible if choice in worth_trying]
            known = {choice: times_s[-KNOWN:] for choice, times_s in self._plain_tails_s.items()}
            log.info(
                "compression: backward %.0f ms, link %.1f MB/s, %.1f for alltoall, and %.2f ms; predicted %s",
                backward_s * 1e3,
                link.ring_bytes_per_s / 1e6,
                link.alltoall_bytes_per_s / 1e6,
                link.latency_s * 1e3,
                ", ".join(f"{choice} {tail_s * 1e3:.0f} ms" for choice, tail_s in predicted.items()),
            )
        self._trials = Trials(choices, known=known)
        self._choice = self._trials.next() or choices[0]

    def _try(self, trials: Trials, tail_s: float, comm: Comm) -> None:
        self._own_tails_s[self._choice].append(tail_s)
        trials.record(self._choice, agreed([tail_s], comm)[0])
        upcoming = trials.next()
        if upcoming is not None and len(trials.times_s) > 1:
            self._choice = upcoming
            return
        self._choice = trials.best()
        self._trials = None
        # As ``_watch`` measures: of many workers the largest median is less than the median of the largest.
        own_tails_s = self._own_tails_s[self._choice][-len(trials.times_s[self._choice]) :]
        self._reference_s = agreed([statistics.median(own_tails_s)], comm)[0]
        self._look_every = min(2 * self._look_every, LOOK_AT_LEAST_EVERY) if self._choice == self._settled else LOOK_EVERY
        self._settled = self._choice
        tried = {**self._plain_tails_s, **trials.dropped_s, **trials.times_s}
        described = ", ".join(f"{choice} {statistics.median(times) * 1e3:.0f} ms" for choice, times in tried.items() if times)
        log.info("compression: from now on %s; backward to sums took: %s", self._choice, described)

    def _watch(self, tail_s: float, comm: MeasuringComm) -> None:
        self._settled_tails_s.append(tail_s)
        if len(self._settled_tails_s) < self._look_every:
            return
        median_s = agreed([statistics.median(self._settled_tails_s)], comm)[0]
        self._settled_tails_s = []
        self._since_probe_s += median_s * self._look_every
        if differ(median_s, self._reference_s, self._reference_s):
            log.info("compression: backward to sums takes %.0f ms instead of %.0f: looking again", median_s * 1e3, self._reference_s * 1e3)
            self._look_again(comm)
        elif self._link is not None and self._link.probe_s <= PROBE_SHARE * self._since_probe_s:
            self._watch_link(self._link, probe_link(comm, self._device), comm)

    def _watch_link(self, before: Link, now: Link, comm: MeasuringComm) -> None:
        """Whether plain sums would take another time on the link, by so much that it matters beside the tail."""
        self._since_probe_s = 0.0
        if differ(now.time_s(self._plain_bytes), before.time_s(self._plain_bytes), self._reference_s):
            log.info("compression: the link has %.1f MB/s instead of %.1f: looking again", now.ring_bytes_per_s / 1e6, before.ring_bytes_per_s / 1e6)
            self._look_again(comm)

    def _look_again(self, comm: MeasuringComm) -> None:
        """Begins anew. Where a worker's exchange gave way to computing for good, nothing leaves during backward any more: it would starve."""
        if agreed([float(comm.gave_way_for_good())], comm)[0]:
            self._possible = [choice for choice in self._possible if not choice.overlap]
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        return self._feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._feedback.load_state_dict(state)

    def rank_state_dict(self) -> dict[str, Tensor]:
        return self._feedback.rank_state_dict()

    def load_rank_state_dict(self, state: dict[str, Tensor]) -> None:
        self._feedback.load_rank_state_dict(state)


def differ(now_s: float, then_s: float, tail_s: float) -> bool:
    """Whether two times differ by a quarter, of the smaller one and of the tail that they are a part of."""
    return abs(now_s - then_s) > CHANGED * max(min(now_s, then_s), tail_s)
