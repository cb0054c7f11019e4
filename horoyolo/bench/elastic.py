"""``bench elastic``: how soon training goes on after a worker was killed, and what being ready for it costs an undisturbed run."""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from horoyolo.bench.figures import machine, paired_ratio, progress, settings, spread
from horoyolo.bench.flags import ELASTIC_PEERS
from horoyolo.bench.processes import Place, chosen_place, orderly_end
from horoyolo.bench.record import Seen
from horoyolo.bench.systems import Size, System, check_peers, ours, running, stock, torchrun
from horoyolo.data.synthetic import write_synthetic
from horoyolo.files import write_json
from horoyolo.launch.remote import LaunchError

START_LIMIT_S = 180.0
WARM_STEPS = 10  # that all workers take together before anything is measured
LONGEST_WAIT_S = 2.0  # from there to a kill, drawn at random: any moment of a step
SLOWEST_RATE = 0.2  # steps a second; a run that is slower is not measured

Make = Callable[[Path], System]


def bench_elastic(parsed: argparse.Namespace) -> dict[str, Any]:
    """Kills workers of every system in turn, then measures step rates in turn; prints both tables, writes the JSON and gives what it holds."""
    place = chosen_place(parsed)
    peers = ELASTIC_PEERS if parsed.peers == [] else parsed.peers or ()
    if peers:
        check_peers(place)
    size = Size(parsed.cfg, parsed.img, parsed.batch, place.num_workers)
    folder = Path(parsed.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "settings": settings(parsed), "workers": place.num_workers}
    with orderly_end(), tempfile.TemporaryDirectory(dir=folder, prefix="elastic-") as name:
        data = Path(name) / "data"
        # All that is measured lies within one epoch: at its end a checkpoint is written, elastic or not.
        one_epoch = (2 * WARM_STEPS + parsed.steps) * size.batch * size.num_workers
        write_synthetic(data, one_epoch * 5 // 4, seed=0)  # every fifth image is not trained on
        ways = systems(place, size, data / "data.yaml", peers)
        if parsed.kills:
            report["recovery"] = measure_recovery(ways, place, Path(name), parsed)
            print_recovery(report["recovery"], place)
        if parsed.repeats:
            report["rates"] = measure_rates(ways, place, Path(name), parsed)
            print_rates(report["rates"], place)
    if parsed.json:
        write_json(parsed.json, report)
    return report


def systems(place: Place, size: Size, data: Path, peers: Sequence[str]) -> dict[str, Make]:
    """What makes each system in a folder of its own; where one has an elastic and a static form their keys say so."""
    ways: dict[str, Make] = {
        "ours elastic": lambda folder: ours(place, size, data, folder, elastic=True),
        "ours static": lambda folder: ours(place, size, data, folder, elastic=False),
    }
    if "stock" in peers:
        ways["stock elastic"] = lambda folder: stock(place, size, folder, commit_every=1)
        ways["stock static"] = lambda folder: stock(place, size, folder, commit_every=0)
    if "torchrun" in peers:
        ways["torchrun elastic"] = lambda folder: torchrun(place, size, folder)
    return ways


def measure_recovery(ways: dict[str, Make], place: Place, folder: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    """Seconds from each kill to the next completed step, and the steps that were done again, of every elastic system; peers share the first kills."""
    kills: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(parsed.kills):
        killed = [key for key in ways if key.endswith("elastic") and (number < parsed.peer_kills or key.startswith("ours"))]
        for make in (ways[key] for key in killed):
            dice = random.Random(f"{parsed.seed} {number}")  # the same victims and moments for all
            with fresh(make, folder) as (system, own):
                kills[system.name].append(one_kill(system, place, own, dice, parsed.limit))
            progress(f"kill {number + 1} of {parsed.kills}, {system.name}: {kills[system.name][-1]}")
    return {name: recovery_row(of_system) for name, of_system in kills.items()}


def recovery_row(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Kills of one system put together; one that it never got over counts as endless."""
    times = [math.inf if kill["seconds"] is None else kill["seconds"] for kill in kills]
    again = [kill["repeated_steps"] for kill in kills if kill["seconds"] is not None]
    figures = {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON knows no infinity
    return {**finite, "never": times.count(math.inf), "repeated_steps": max(again, default=0), "kills": kills}


@contextmanager
def fresh(make: Make, folder: Path) -> Iterator[tuple[System, Path]]:
    """A system and the new folder that it writes to."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield make(Path(name)), Path(name)


def one_kill(system: System, place: Place, folder: Path, dice: random.Random, limit_s: float) -> dict[str, Any]:
    """Starts a system, kills a worker of it and waits for the next step of the rest; ``seconds`` None: none came in time."""
    size = place.num_workers
    with running(system, place, folder) as job:
        job.wait(lambda steps: _nth(steps, size, WARM_STEPS), START_LIMIT_S)
        victims = job.workers()
        if len(victims) != size:
            raise LaunchError(f"{system.name}: {len(victims)} workers were found on the hosts, {size} train")
        victim = dice.choice(victims)
        time.sleep(dice.uniform(0, LONGEST_WAIT_S))
        killed_s = job.kill(victim)
        before = system.record.steps()
        found: dict[str, Any] = {"seconds": None, "repeated_steps": None, "host": place.hosts[victim[0]].name}
        try:
            first, seen_s = job.wait(lambda steps: _next(system, before, steps[len(before) :], size), limit_s)
        except LaunchError as error:
            return {**found, "why": str(error).splitlines()[0]}
    again = max(step.step for step in before) + 1 - first.step
    return {**found, "seconds": seen_s - killed_s, "repeated_steps": max(0, again)}


def _nth(steps: Sequence[Seen], workers: int, number: int) -> Seen | None:
    return next((step for step in steps if step.workers == workers and step.step >= number), None)


def _next(system: System, before: Sequence[Seen], later: Sequence[Seen], workers: int) -> Seen | None:
    """The first step that others completed without the one who was killed: fewer of them, or, where all are started again, new ones."""
    known = {step.process for step in before}
    return next((step for step in later if step.workers < workers or (system.restarts and step.process not in known)), None)


def measure_rates(ways: dict[str, Make], place: Place, folder: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of undisturbed runs, in turn; elastic ones against static ones of the same repeat."""
    pairs = [key.removesuffix(" static") for key in ways if key.endswith("static")]
    keys = [f"{pair} {form}" for pair in pairs for form in ("static", "elastic")]
    seconds: dict[str, list[float]] = {key: [] for key in keys}
    names: dict[str, str] = {}
    for repeat in range(parsed.repeats):
        for key in keys if repeat % 2 == 0 else keys[::-1]:
            with fresh(ways[key], folder) as (system, own):
                names[key] = system.name
                seconds[key].append(one_rate(system, place, own, parsed.steps))
            progress(f"repeat {repeat + 1} of {parsed.repeats}, {system.name}: {seconds[key][-1] * 1e3:.1f} ms a step")
    rows = {key: spread(values) for key, values in seconds.items()}
    for pair in pairs:
        rows[f"{pair} elastic"]["rate_against_static"] = paired_ratio(seconds[f"{pair} elastic"], seconds[f"{pair} static"])
    return {names[key]: row for key, row in rows.items()}


def one_rate(system: System, place: Place, folder: Path, steps: int) -> float:
    """Seconds a step, over ``steps`` steps."""
    with running(system, place, folder) as job:
        first, first_s = job.wait(lambda seen: _nth(seen, place.num_workers, WARM_STEPS), START_LIMIT_S)
        last, last_s = job.wait(lambda seen: _nth(seen, place.num_workers, first.step + steps), steps / SLOWEST_RATE)
    return (last_s - first_s) / (last.step - first.step)


def print_recovery(recovery: dict[str, Any], place: Place) -> None:
    """A row a system."""
    print(f"kill -9 of one of {place.name}: seconds to the next completed step")
    print(f"{'':34}{'kills':>8}{'median':>10}{'least':>10}{'most':>10}{'never':>8}{'steps done again':>20}")
    for name, row in recovery.items():
        times = "".join(f"{'never' if row[key] is None else format(row[key], '.2f'):>10}" for key in ("median_s", "min_s", "max_s"))
        print(f"{name:34}{len(row['kills']):8}{times}{row['never']:8}{row['repeated_steps']:20}")


def print_rates(rates: dict[str, Any], place: Place) -> None:
    """A row a system."""
    print(f"undisturbed, {place.name}")
    print(f"{'':34}{'ms a step':>10}{'min':>10}{'max':>10}{'rate against static':>24}")
    for name, row in rates.items():
        against = f"{row['rate_against_static']:24.3f}" if "rate_against_static" in row else ""
        print(f"{name:34}{row['median_s'] * 1e3:10.1f}{row['min_s'] * 1e3:10.1f}{row['max_s'] * 1e3:10.1f}{against}")
