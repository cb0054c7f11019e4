"""What the tests of elastic jobs share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from elasticjob import LAUNCH, STUB, ElasticJob


@pytest.fixture
def start_elastic(tmp_path: Path) -> Iterator[Callable[..., ElasticJob]]:
    """``start_elastic(slots, min_np, ...)`` starts an elastic job of stub workers here; whatever is left of it is killed."""
    jobs = []

    def start(
        slots: int,
        min_np: int,
        max_np: int | None = None,
        plan: str = "",
        worker: Path = STUB,
        hang_timeout_s: float = 15,
        stderr: int | None = None,
        **env: str,
    ) -> ElasticJob:
        hostfile = tmp_path / "hosts"
        hostfile.write_text(f"localhost slots={slots}\n")
        argv = [sys.executable, str(worker), str(tmp_path), *filter(None, [plan])]
        words = [argv, env, str(hostfile), min_np, max_np, hang_timeout_s]
        with (tmp_path / "log.txt").open("w") as log:
            process = subprocess.Popen([sys.executable, "-c", LAUNCH, json.dumps(words)], stdout=log, stderr=stderr or log)
        jobs.append(ElasticJob(process, tmp_path, hostfile))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()
        job.process.wait()
        for pid in job.processes() if (tmp_path / "folder").exists() else []:
            os.kill(pid, signal.SIGKILL)
