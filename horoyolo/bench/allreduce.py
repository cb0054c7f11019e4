"""``bench allreduce``: latency and bandwidth of a sum over workers by its size; ours, stock Horovod's, and plain sockets over the same link."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from horoyolo.bench.figures import machine, paired_ratio, progress, settings, spread
from horoyolo.bench.processes import SHORT, chosen_place, launched, orderly_end, peer_script, side_by_side
from horoyolo.compression.base import ring_bytes
from horoyolo.files import write_json

SOCKETS = "plain sockets"


def bench_allreduce(parsed: argparse.Namespace) -> dict[str, Any]:
    """Runs all of them in turn, ``repeats`` times over; prints the table, writes the JSON and the plot and gives what the JSON holds."""
    place = chosen_place(parsed)
    sizes = sorted(set(parsed.sizes))
    words = ["--sizes", *map(str, sizes)]
    own = [sys.executable, "-m", "horoyolo.bench.allreduce_worker", *words]
    ours, stock = place.job(own), place.job([*peer_script("stock_allreduce.py"), *words], peer=True)
    runs: dict[str, Callable[[], dict[str, float]]] = {}
    for launcher in parsed.launchers:
        runs[f"horoyolo, {SHORT[launcher]}"] = partial(launched, ours, place.hosts, launcher)
        runs[f"stock Horovod, {SHORT[launcher]}"] = partial(launched, stock, place.hosts, launcher)
    runs[SOCKETS] = lambda: side_by_side(place, place.job([*own, "--sockets"]))[0]

    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in runs}
    with orderly_end():
        for repeat in range(parsed.repeats):
            for name, run in runs.items():
                progress(f"repeat {repeat + 1} of {parsed.repeats}: {name}")
                for size, median_s in run().items():
                    times[name][int(size)].append(median_s)

    print(f"{place.name}: milliseconds (min to max) and MB/s that each worker sends, {parsed.repeats} repeats")
    variants = {name: {str(size): _figures(size, place.num_workers, values) for size, values in of_run.items()} for name, of_run in times.items()}
    for name in runs:
        for size in sizes:
            variants[name][str(size)]["rate_against_sockets"] = paired_ratio(times[name][size], times[SOCKETS][size])
    _print_table(sizes, variants)
    report = {"machine": machine(), "settings": settings(parsed), "workers": place.num_workers, "variants": variants}
    if parsed.json:
        write_json(parsed.json, report)
    if parsed.plot:
        from horoyolo.bench.plots import plot_allreduce

        plot_allreduce(variants, parsed.plot)
    return report


def _figures(size: int, num_workers: int, times: list[float]) -> dict[str, Any]:
    figures = spread(times)
    return {**figures, "bytes_per_s": ring_bytes(size, num_workers) / figures["median_s"]}


def _print_table(sizes: list[int], variants: dict[str, Any]) -> None:
    print(f"{'bytes':>10}" + "".join(f"{name:>36}" for name in variants))
    for size in sizes:
        cells = []
        for figures in (of_run[str(size)] for of_run in variants.values()):
            span = f"{figures['median_s'] * 1e3:.2f} ({figures['min_s'] * 1e3:.2f} to {figures['max_s'] * 1e3:.2f})"
            cells.append(f"{span:>27}{figures['bytes_per_s'] / 1e6:9.1f}")
        print(f"{size:10}" + "".join(cells))
