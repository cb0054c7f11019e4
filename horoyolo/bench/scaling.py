"""``bench scaling``: what the exchange costs. Workers that exchange every step against as many processes that never heard of Horovod."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from horoyolo.bench.figures import machine, paired_ratio, progress, settings
from horoyolo.bench.processes import SHORT, Place, chosen_place, launched, orderly_end, side_by_side
from horoyolo.bench.step import table, variant_name
from horoyolo.files import write_json
from horoyolo.launch.job import Job


def bench_scaling(parsed: argparse.Namespace) -> dict[str, Any]:
    """Runs every variant in turn, ``repeats`` times over; prints the table, writes the JSON and gives what it holds.

    The order is another in each repeat: a machine that is disturbed for a while would always meet the same neighbours of a fixed one.
    """
    place = chosen_place(parsed)
    variants = [variant_name(parsed.precision, layout) for layout in parsed.layouts]
    nchw = variant_name(parsed.precision, "NCHW")
    has_peer = bool(parsed.peer) and nchw in variants  # which knows no other layout
    runs: dict[str, Callable[[], float]] = {}
    for variant in variants:
        runs[f"{variant}, no exchange"] = partial(plain_step_s, place, worker_argv(parsed, variant, "--alone"))
    for variant in variants:
        runs[f"{variant}, raw socket"] = partial(plain_step_s, place, worker_argv(parsed, variant, "--sockets"))
    for launcher in parsed.launchers:
        for variant in variants:
            runs[f"{variant}, {SHORT[launcher]}"] = partial(launched_step_s, place, place.job(worker_argv(parsed, variant)), launcher)
        if has_peer:
            peer = place.job([sys.executable, parsed.peer, *size_words(parsed), "--precision", nchw.split()[0]], peer=True)
            runs[f"{nchw}, {SHORT[launcher]}, stock optimizer"] = partial(launched_step_s, place, peer, launcher)

    medians: dict[str, list[float]] = {name: [] for name in runs}
    with orderly_end():
        for repeat in range(parsed.repeats):
            for name in random.Random(repeat).sample(list(runs), len(runs)):
                progress(f"repeat {repeat + 1} of {parsed.repeats}: {name}")
                medians[name].append(runs[name]())

    print(f"{place.name}, {parsed.cfg}, {parsed.img} px, {parsed.batch} images each, 1 thread each")
    result = table(medians, parsed.batch * place.num_workers, baseline=next(iter(runs)))
    for launcher in parsed.launchers:
        for variant in variants:
            name = f"{variant}, {SHORT[launcher]}"
            ratio = paired_ratio(medians[name], medians[f"{variant}, raw socket"])
            result[name]["rate_against_raw_socket"] = ratio
            print(f"{name}: {ratio:.3f} of the rate against raw socket")
        if has_peer:
            name = f"{nchw}, {SHORT[launcher]}"
            ratio = paired_ratio(medians[name], medians[f"{name}, stock optimizer"])
            result[name]["rate_against_stock"] = ratio
            print(f"{name}: {ratio:.2f}x the rate of stock Horovod's DistributedOptimizer")
    report = {"machine": machine(), "settings": settings(parsed), "workers": place.num_workers, "variants": result}
    if parsed.json:
        write_json(parsed.json, report)
    return report


def plain_step_s(place: Place, argv: Sequence[str]) -> float:
    """The median step of processes that never initialise Horovod, timed at the same moment, when all are warm; the mean over processes."""
    return statistics.mean(each["step_s"] for each in side_by_side(place, place.job(argv)))


def launched_step_s(place: Place, job: Job, launcher: str) -> float:
    """The median step of workers that a launcher started."""
    return launched(job, place.hosts, launcher)["step_s"]


def worker_argv(parsed: argparse.Namespace, variant: str, *how: str) -> list[str]:
    """What runs one worker of this bench."""
    return [sys.executable, "-m", "horoyolo.bench.worker", *size_words(parsed), "--variant", variant, *how]


def size_words(parsed: argparse.Namespace) -> Sequence[str]:
    """The words that say how large a step is and how many there are."""
    return ["--cfg", parsed.cfg, "--img", str(parsed.img), "--batch", str(parsed.batch), "--steps", str(parsed.steps)]
