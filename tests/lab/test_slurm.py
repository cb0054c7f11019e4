"""The laws of the lab's Slurm: steps reach each node over the lab's network, MPI works, jobs are requeued, signals arrive."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import LabError
from slurmlab import Slurm

MPI_HELLO = """
import os
from mpi4py import MPI
world = MPI.COMM_WORLD
print(world.rank, world.size, os.uname().nodename, world.allreduce(world.rank + 1), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
"""


def wait_until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.1)


def write_script(folder: Path, body: str) -> Path:
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{body}")
    return script


def test_steps_reach_every_node_and_its_status_comes_back(slurm: Slurm) -> None:
    done = slurm.run(["srun", "-N2", "--label", "hostname"])
    assert sorted(done.stdout.splitlines()) == ["0: node1", "1: node2"]
    assert slurm.run(["srun", "-N2", "sh", "-c", "exit 3"]).returncode == 3
    ask = 'test $SLURM_PROCID = 1 || echo "$SLURM_JOB_NODELIST" "$SLURM_TASKS_PER_NODE" $(scontrol show hostnames)'
    assert slurm.run(["srun", "-N2", "sh", "-c", ask]).stdout.split() == ["node[1-2]", "1(x2)", "node1", "node2"]


def test_mpi_over_pmix_between_two_nodes(slurm: Slurm) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (scripts/setup.sh)")
    done = slurm.run(["srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "--mpi=pmix", sys.executable, "-c", MPI_HELLO])
    assert sorted(done.stdout.splitlines()) == [f"{rank} 4 node{1 + rank // 2} 10 0,1" for rank in range(4)], done.stderr


def test_an_allocation_has_ssh_between_its_nodes(slurm: Slurm, tmp_path: Path) -> None:
    script = write_script(tmp_path, "ssh node2 hostname\n")
    job = slurm.wait_job(slurm.sbatch(script, "-N2", f"--output={tmp_path}/out.txt"))
    assert job["JobState"] == "COMPLETED"
    assert (tmp_path / "out.txt").read_text() == "node2\n"


def test_a_job_is_signalled_requeued_and_finishes(slurm: Slurm, tmp_path: Path) -> None:
    body = """echo start ${SLURM_RESTART_COUNT:-0}
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
trap 'echo signal; scontrol requeue $SLURM_JOB_ID; exit 75' USR1
sleep 60 & wait
"""
    log = tmp_path / "out.txt"
    job_id = slurm.sbatch(write_script(tmp_path, body), "-N2", "--requeue", "--open-mode=append", f"--output={log}")
    slurm.wait_job(job_id, ["RUNNING"])
    wait_until(lambda: log.exists() and "start 0" in log.read_text())
    slurm.run(["scancel", "--batch", "--signal=USR1", str(job_id)])
    job = slurm.wait_job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    words = log.read_text()
    assert words.index("start 0") < words.index("signal") < words.index("start 1")


def test_refusals_say_why(slurm: Slurm, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="invalid partition"):
        slurm.sbatch(write_script(tmp_path, "true\n"), "--partition=none")
    job_id = slurm.sbatch(write_script(tmp_path, "sleep 60\n"), f"--output={tmp_path}/out.txt")
    with pytest.raises(LabError, match=f"after 1 s job {job_id} is "):
        slurm.wait_job(job_id, timeout=1)


def test_slurm_can_be_stopped_and_started_by_the_command(make_lab) -> None:
    lab = make_lab(2)
    lab_sh = [Path(__file__).parents[2] / "scripts" / "lab.sh", "--lab", lab.id]
    before = [lab.processes(host) for host in lab.hosts]
    for _ in range(2):
        subprocess.run([*lab_sh, "slurm", "up"], check=True, timeout=60)
        done = subprocess.run([*lab_sh, "exec", "node1", "srun", "-N2", "hostname"], check=True, timeout=60, capture_output=True, text=True)
        assert sorted(done.stdout.split()) == ["node1", "node2"]
        subprocess.run([*lab_sh, "slurm", "down"], check=True, timeout=60)
        assert [lab.processes(host) for host in lab.hosts] == before
