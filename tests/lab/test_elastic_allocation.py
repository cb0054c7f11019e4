"""Elastic jobs of stub workers inside a Slurm allocation: srun starts the agents, and a node that is down is left out."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from slurmlab import Slurm
from training import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "elastic"))

from elasticjob import LAUNCH, STUB, ElasticJob

ALLOCATE = ["salloc", "--quiet", "--no-kill", "--nodes=2", "--ntasks-per-node=2"]


def test_a_node_that_goes_down_is_left_out(slurm: Slurm, tmp_path: Path) -> None:
    for host in slurm.lab.hosts:
        slurm.lab.stop_sshd(host)
    words = [[sys.executable, str(STUB), str(tmp_path)], {}, str(tmp_path / "hosts"), 1, None, 15]
    with (tmp_path / "log.txt").open("w") as log:
        process = slurm.lab.popen("node1", [*ALLOCATE, sys.executable, "-c", LAUNCH, json.dumps(words)], stdout=log, stderr=log, cwd=tmp_path)
    job = ElasticJob(process, tmp_path, tmp_path / "hosts")
    first = job.wait_for(1, 4, timeout_s=60)
    assert [place["worker"] for place in first] == ["node1.0", "node1.1", "node2.0", "node2.1"]

    slurm.lab.run("node1", ["scontrol", "update", "nodename=node2", "state=down", "reason=test"], check=True)
    second = job.wait_for(2, 2, timeout_s=60)
    assert [place["worker"] for place in second] == ["node1.0", "node1.1"]

    (launcher,) = slurm.lab.run("node1", ["pgrep", "-f", f"^{sys.executable} -c"], check=True).stdout.split()
    slurm.lab.run("node1", ["kill", f"-{int(signal.SIGTERM)}", launcher], check=True)
    assert process.wait(60) == 75, job.log()
    wait_until(lambda: not job.processes(), timeout_s=20)
