"""``bench scaling``: what the exchange costs. Workers that exchange every step against as many processes that never heard of each other."""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
from typing import Any

from horoyolo.bench.step import settings, table, write_json
from horoyolo.launch.command import LAUNCHERS, Job, worker_env
from horoyolo.launch.hosts import local_hosts

LIMIT_S = 600.0
CHANNELS_LAST, NCHW = "bf16 channels_last", "bf16 NCHW"
SHORT = {"horovodrun": "Gloo", "mpirun": "MPI"}


def bench_scaling(parsed: argparse.Namespace) -> dict[str, Any]:
    """Runs every variant in turn, ``repeats`` times over; prints the table, writes the JSON and gives what it holds."""
    env = worker_env(parsed.num_proc, parsed.num_proc, {})  # one thread a worker
    runs = {f"{variant}, no exchange": (None, _worker(parsed, variant)) for variant in (CHANNELS_LAST, NCHW)}
    for launcher in parsed.launchers:
        for variant in (CHANNELS_LAST, NCHW):
            runs[f"{variant}, {SHORT[launcher]}"] = (launcher, _worker(parsed, variant))
        if parsed.peer:
            words = ["--cfg", parsed.cfg, "--img", str(parsed.img), "--batch", str(parsed.batch), "--steps", str(parsed.steps)]
            runs[f"{NCHW}, {SHORT[launcher]}, stock optimizer"] = (launcher, [sys.executable, parsed.peer, *words])

    medians: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(parsed.repeats):
        for name, (launcher, argv) in runs.items():
            job = Job(parsed.num_proc, tuple(argv), env, as_root=os.geteuid() == 0)
            medians[name].append(_launched_s(job, launcher) if launcher else _side_by_side_s(job))

    print(f"{parsed.num_proc} workers, {parsed.cfg}, {parsed.img} px, {parsed.batch} images each, 1 thread each")
    baseline = next(iter(runs))
    result = table(medians, parsed.batch * parsed.num_proc, baseline)
    for launcher in parsed.launchers if parsed.peer else ():
        ours, stock = (medians[f"{NCHW}, {SHORT[launcher]}{tail}"] for tail in ("", ", stock optimizer"))
        ratio = statistics.median(s / o for o, s in zip(ours, stock, strict=True))
        result[f"{NCHW}, {SHORT[launcher]}"]["rate_against_stock"] = ratio
        print(f"{NCHW} over {SHORT[launcher]}: {ratio:.2f}x the rate of stock Horovod's DistributedOptimizer")
    report = {"machine": platform.processor() or platform.machine(), "settings": settings(parsed), "variants": result}
    write_json(parsed.json, report)
    return report


def _worker(parsed: argparse.Namespace, variant: str) -> list[str]:
    sizes = ["--cfg", parsed.cfg, "--img", str(parsed.img), "--batch", str(parsed.batch), "--steps", str(parsed.steps)]
    return [sys.executable, "-m", "horoyolo.bench.worker", *sizes, "--variant", variant]


def _launched_s(job: Job, launcher: str) -> float:
    """The median step of a job whose workers exchange."""
    argv = LAUNCHERS[launcher](job, local_hosts(job.num_workers))
    done = subprocess.run(argv, env={**os.environ, **job.env}, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return _reported_s(done.stdout, done.stderr)


def _side_by_side_s(job: Job) -> float:
    """The median step of as many plain processes, timed at the same moment, when all are warm; the mean over processes."""
    processes = [_start_waiting(job) for _ in range(job.num_workers)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # ready
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return statistics.mean(_reported_s(*process.communicate(timeout=LIMIT_S)) for process in processes)


def _start_waiting(job: Job) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*job.argv, "--wait"], env={**os.environ, **job.env}, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _reported_s(output: str, errors: str) -> float:
    found = re.search(r"median_step_s=([\d.]+)", output)
    if found is None:
        raise RuntimeError(f"a bench worker reported nothing:\n{errors[-2000:]}")
    return float(found[1])
