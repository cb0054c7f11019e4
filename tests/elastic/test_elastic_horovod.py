"""Generations of real Horovod workers on this machine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from elasticjob import ElasticJob, wait_until

WORKER = Path(__file__).with_name("horovod_worker.py")


@pytest.fixture
def job(start_elastic) -> ElasticJob:
    """Three workers, at least one."""
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    return start_elastic(slots=3, min_np=1, worker=WORKER, OMP_NUM_THREADS="1")


def first_step(job: ElasticJob, generation: int) -> float | None:
    """When the first step of a generation was completed; None before."""
    rows = [line.split() for path in job.out.glob("steps.*") for line in path.read_text().splitlines()]
    times = [float(row[0]) for row in rows if len(row) == 3 and int(row[1]) == generation]
    return min(times) if times else None


def test_a_killed_worker_a_newcomer_and_a_leaver(job):
    first = job.wait_for(1, 3, timeout_s=60)
    wait_until(lambda: first_step(job, 1))

    begin_s = time.time()
    os.kill(first[0]["pid"], signal.SIGKILL)
    second = job.wait_for(2, 2)
    wait_until(lambda: first_step(job, 2))
    assert first_step(job, 2) - begin_s < 2.5  # about 0.2 on a quiet machine
    assert [place["pid"] for place in second] == [place["pid"] for place in first[1:]]

    third = job.wait_for(3, 3, timeout_s=60)
    assert [place["pid"] for place in third[:2]] == [place["pid"] for place in second]
    wait_until(lambda: first_step(job, 3))

    job.hostfile.write_text("localhost slots=2\n")
    fourth = job.wait_for(4, 2, timeout_s=60)
    assert {place["worker"] for place in fourth} == {f"{os.uname().nodename}.{slot}" for slot in range(2)}
    wait_until(lambda: first_step(job, 4))
    assert "died" not in job.log().split("generation 3:")[1]  # in order

    for slot in range(3):
        (job.out / f"finish.{slot}").touch()
    assert job.wait() == 0, job.log()
