from __future__ import annotations

import subprocess
import sys

import pytest

from horoyolo.launch.command import Job, direct_command, horovodrun_command, mpirun_command, threads_per_worker, worker_env
from horoyolo.launch.hosts import local_hosts

JOB = Job(2, ("python", "-m", "horoyolo", "train"), env={"OMP_NUM_THREADS": "1", "B": "x y"})


def test_horovodrun_command():
    command = "horovodrun -np 2 -H localhost:2 --gloo --network-interfaces lo python -m horoyolo train"
    assert horovodrun_command(JOB, local_hosts(2)) == command.split()


def test_mpirun_command():
    command = "mpirun -np 2 -H localhost:2 -bind-to none -map-by slot -mca pml ob1 -mca btl ^openib -x B -x OMP_NUM_THREADS"
    assert mpirun_command(JOB, local_hosts(2)) == [*command.split(), *JOB.argv]


def test_mpirun_is_told_about_root():
    assert mpirun_command(Job(2, ("w",), as_root=True), local_hosts(2))[1] == "--allow-run-as-root"


def test_one_worker_is_started_directly():
    assert direct_command(JOB, local_hosts(1)) == list(JOB.argv)


@pytest.mark.parametrize(("num_workers", "num_cores", "threads"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (4, 2, 1)])
def test_workers_share_the_cores(num_workers, num_cores, threads):
    assert threads_per_worker(num_workers, num_cores) == threads


def test_the_users_environment_wins():
    assert worker_env(2, 8, {})["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in worker_env(2, 8, {"OMP_NUM_THREADS": "3"})


def test_launching_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import horoyolo.launch.run"
    subprocess.run([sys.executable, "-c", code], check=True)
