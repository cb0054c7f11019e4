from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from horoyolo.config import InputError
from horoyolo.launch.hosts import local_hosts
from horoyolo.launch.job import Job
from horoyolo.launch.run import _Agents, new_status_dir, run_job
from horoyolo.launch.status import STATUS_DIR, job_status

STUB = str(Path(__file__).with_name("stub_worker.py"))
LAUNCH = """
import sys
from horoyolo.launch.hosts import local_hosts
from horoyolo.launch.job import Job
from horoyolo.launch.run import new_status_dir, run_job
from horoyolo.launch.status import STATUS_DIR
plan, num_workers, launcher, out, stub = sys.argv[1:]
job = Job(int(num_workers), (sys.executable, stub, plan, out), env={"OMP_NUM_THREADS": "1", STATUS_DIR: str(new_status_dir())}, as_root=True)
sys.exit(run_job(job, local_hosts(int(num_workers)), launcher))
"""


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([0, 0], 0), ([0, 75], 75), ([75, 1], 1), ([1, 2, 75, 0], 2), ([0, -9], 1), ([75, 143], 1), ([3], 1)],
)
def test_one_status_for_a_job(statuses, expected):
    assert job_status(statuses) == expected


def test_unknown_launcher_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'ssh'.*known are horovodrun, mpirun"):
        run_job(Job(2, ("true",)), local_hosts(2), "ssh")


def test_lines_that_do_not_end_are_cut_off_after_one_limit_for_all(monkeypatch):
    monkeypatch.setattr("horoyolo.launch.run.GRACE_S", 0.2)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    lines = {f"n{number}": subprocess.Popen(["sleep", "60"], **pipes) for number in range(20)}
    begin_s = time.monotonic()
    _Agents(lines).close()
    assert 0.2 <= time.monotonic() - begin_s < 2  # one limit for each would take 4
    assert [line.returncode for line in lines.values()] == [-signal.SIGKILL] * 20


def test_missing_launcher_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(InputError, match=r"mpirun is not installed.*scripts/setup\.sh"):
        run_job(Job(2, ("true",)), local_hosts(2), "mpirun")


@pytest.mark.parametrize(("plan", "expected"), [("done", 0), ("fail", 2), ("die", 1)])
def test_status_of_one_worker(plan, expected, tmp_path):
    job = Job(1, (sys.executable, STUB, plan, str(tmp_path)), env={"OMP_NUM_THREADS": "2", **status_env()})
    assert run_job(job, local_hosts(1)) == expected
    assert (tmp_path / "started.0").read_text().split()[1] == "2"


def test_status_of_a_worker_that_reports_nothing():
    assert run_job(Job(1, (sys.executable, "-c", "raise SystemExit(2)"), env=status_env()), local_hosts(1)) == 2


def status_env() -> dict[str, str]:
    return {STATUS_DIR: str(new_status_dir())}


@pytest.fixture
def launch_argv(tmp_path):
    """``launch_argv(plan, num_workers, launcher)`` are the words that start a launcher; whatever is left of its workers is killed."""

    def words(plan: str, num_workers: int, launcher: str = "horovodrun") -> list[str]:
        if num_workers > 1:
            pytest.importorskip("horovod", reason="Horovod is not installed (scripts/setup.sh builds it)")
        return [sys.executable, "-c", LAUNCH, plan, str(num_workers), launcher, str(tmp_path), STUB]

    yield words
    for pid in worker_pids(tmp_path):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start_job(launch_argv):
    """``start_job(plan, num_workers, launcher)`` starts a launcher in a process of its own."""
    processes = []

    def start(*words: str | int) -> subprocess.Popen:
        processes.append(subprocess.Popen(launch_argv(*words)))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def worker_pids(folder: Path) -> list[int]:
    """Ids of the workers that have written theirs; a file that is still empty is about to be."""
    return [int(words[0]) for path in folder.glob("started.*") if (words := path.read_text().split())]


def is_running(pid: int) -> bool:
    try:
        return STUB.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_until(condition, timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.05)


def test_bad_input_met_by_one_of_two_workers_is_the_jobs_status(start_job, tmp_path):
    assert start_job("fail", 2).wait(40) == 2
    assert not any(is_running(pid) for pid in worker_pids(tmp_path))


@pytest.mark.parametrize(("launcher", "number"), [("horovodrun", signal.SIGTERM), ("mpirun", signal.SIGUSR1)])
def test_a_request_to_stop_reaches_all_workers_and_leaves_them_time(launcher, number, start_job, tmp_path):
    process = start_job("stop", 2, launcher)
    wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == 2)
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)  # too soon to be meant
    assert process.wait(40) == 75
    assert len(list(tmp_path.glob("stopped.*"))) == 2


@pytest.mark.parametrize(("num_workers", "launcher"), [(1, "horovodrun"), (2, "horovodrun"), (2, "mpirun")])
def test_a_terminal_that_goes_away_is_a_request_to_stop(num_workers, launcher, launch_argv, in_terminal, tmp_path):
    """Nobody reads what launcher and workers say any more; they end in order all the same."""
    process, hang_up = in_terminal(launch_argv("stop", num_workers, launcher))
    wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == num_workers)
    hang_up()
    assert process.wait(40) == 75
    assert len(list(tmp_path.glob("stopped.*"))) == num_workers


def test_a_job_that_was_started_to_outlive_its_terminal_does(launch_argv, in_terminal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nohup.out
    process, hang_up = in_terminal(["nohup", *launch_argv("stop", 1, "horovodrun")])
    wait_until(lambda: list(tmp_path.glob("ready.*")))
    hang_up()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 75


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_second_request_ends_workers_that_do_not_listen(num_workers, start_job, tmp_path):
    process = start_job("ignore", num_workers)
    wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == num_workers)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 1
    assert not any(is_running(pid) for pid in worker_pids(tmp_path))


def test_a_request_before_the_workers_are_ready_ends_them(start_job, tmp_path):
    process = start_job("work", 2)
    wait_until(lambda: len(worker_pids(tmp_path)) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 75  # a job that was started again may have a checkpoint
    assert not any(is_running(pid) for pid in worker_pids(tmp_path))


def test_workers_end_when_the_launcher_is_killed(start_job, tmp_path):
    process = start_job("work", 2)
    wait_until(lambda: len(worker_pids(tmp_path)) == 2)
    process.kill()
    wait_until(lambda: not any(is_running(pid) for pid in worker_pids(tmp_path)))
