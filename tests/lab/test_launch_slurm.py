"""Batch scripts of ``horoyolo launch --slurm --script`` on a real Slurm: they train on two nodes, stop in time, go on, and end for good."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from netlab import Lab
from slurmlab import Slurm
from training import ENV, EPOCHS, HOROYOLO, check_same_run, steps, train_words, wait_until, workers

from horoyolo.launch.slurm import SlurmOptions, render_batch

# In the place of python: workers that run until they are asked to stop, and what their notes come to.
STUB = """#!/bin/bash
[ "$2" = horoyolo.launch.status ] && { echo 75; exit; }
echo "start $SLURM_JOB_ID" >> "task-$SLURM_ARRAY_TASK_ID.txt"
trap 'echo TERM >> "task-$SLURM_ARRAY_TASK_ID.txt"; exit 0' TERM
sleep 60 & wait
"""


def write_batch(folder: Path, dataset: Path, launcher: str) -> Path:
    """A batch script for two nodes, one worker each, with a time limit of ten minutes."""
    script = folder / "train.sbatch"
    launch = ["launch", "--slurm", "--launcher", launcher, "--nodes", "2", "--time", "10", "--script", str(script)]
    subprocess.run([*HOROYOLO, *launch, "--", *train_words(dataset, folder)], check=True, cwd=folder, timeout=60)
    return script


def log_of(folder: Path, job_id: int) -> str:
    return "".join(path.read_text() for path in folder.glob(f"*-{job_id}.out"))[-4000:]


def all_workers(lab: Lab) -> list[int]:
    return [pid for pids in workers(lab, ["train"]).values() for pid in pids]


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process."""
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool((int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)) >> (number - 1) & 1)


def bring_limit_near(slurm: Slurm, job_id: int) -> None:
    """Leave a running job one to two minutes: Slurm, which looks every 30 s, then finds that the signal is due."""
    hours, minutes, _ = slurm.job(job_id)["RunTime"].split(":")
    slurm.run(["scontrol", "update", f"JobId={job_id}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}"], check=True)


@pytest.mark.parametrize(("launcher", "limit"), [("slurm", "its own"), ("horovodrun", "by hand")])
def test_a_job_stops_at_its_time_limit_is_requeued_and_finishes(
    slurm: Slurm, launcher: str, limit: str, dataset: Path, alone: list[dict[str, str]], tmp_path: Path
) -> None:
    script = write_batch(tmp_path, dataset, launcher)
    job_id = slurm.sbatch(script, cwd=tmp_path, env=ENV)
    # The run is short, so it is held after its first steps until the signal has come.
    while not steps(tmp_path / "run"):
        assert slurm.job(job_id)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log_of(tmp_path, job_id)
        time.sleep(0.02)
    held = all_workers(slurm.lab)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    assert len(held) == 2, log_of(tmp_path, job_id)
    if limit == "its own":
        bring_limit_near(slurm, job_id)
    else:  # that takes half a minute: once is enough
        slurm.run(["scancel", "--batch", "--signal=USR1", str(job_id)], check=True)
    wait_until(lambda: all(is_pending(pid, signal.SIGTERM) for pid in held), timeout_s=60)
    slurm.run(["scontrol", "update", f"JobId={job_id}", "TimeLimit=10"], check=True)
    for pid in held:
        os.kill(pid, signal.SIGCONT)

    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in held), timeout_s=60)
    first = steps(tmp_path / "run")
    assert 1 <= len(first) < 3 * EPOCHS
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))

    job = slurm.wait_job(job_id, timeout=180)
    assert job["JobState"] == "COMPLETED", log_of(tmp_path, job_id)
    assert int(job["Restarts"]) >= 1
    whole = steps(tmp_path / "run")
    assert whole[: len(first)] == first  # each step once
    check_same_run(whole, alone, num_workers=2)
    assert not list(tmp_path.glob(".status*"))


def test_a_finished_job_is_not_requeued(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    job_id = slurm.sbatch(write_batch(tmp_path, dataset, "slurm"), cwd=tmp_path, env=ENV)
    job = slurm.wait_job(job_id, timeout=180)
    assert job["JobState"] == "COMPLETED", log_of(tmp_path, job_id)
    time.sleep(1)
    assert slurm.job(job_id)["JobState"] == "COMPLETED"
    assert slurm.job(job_id)["Restarts"] == "0"
    before = (tmp_path / "run" / "steps.csv").read_bytes()
    # Somebody does it all the same: it finds nothing to do.
    slurm.run(["scontrol", "requeue", str(job_id)], check=True)
    slurm.wait_job(job_id, ["PENDING", "RUNNING"])
    job = slurm.wait_job(job_id, timeout=180)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log_of(tmp_path, job_id)
    assert (tmp_path / "run" / "steps.csv").read_bytes() == before


@pytest.mark.parametrize("launcher", ["slurm", "horovodrun"])
def test_a_task_of_an_array_is_stopped_and_requeued_alone(slurm: Slurm, launcher: str, tmp_path: Path) -> None:
    """One of them has the number of the whole array."""
    stub, script = tmp_path / "stub", tmp_path / "array.sbatch"
    stub.write_text(STUB if launcher == "slurm" else STUB.replace("exit 0", "exit 75"))
    stub.chmod(0o755)
    script.write_text(render_batch(["train"], SlurmOptions(array="0-2", time="10"), launcher, {}, str(tmp_path), str(stub)))
    array = slurm.sbatch(script, cwd=tmp_path)
    notes = {number: tmp_path / f"task-{number}.txt" for number in range(3)}
    wait_until(lambda: all(note.exists() and note.read_text() for note in notes.values()), timeout_s=60)
    begun = {number: note.read_text() for number, note in notes.items()}
    first = next(number for number, text in begun.items() if text == f"start {array}\n")

    slurm.run(["scancel", "--batch", "--signal=USR1", f"{array}_{first}"], check=True)
    wait_until(lambda: notes[first].read_text().count("start") == 2, timeout_s=60)
    assert notes[first].read_text().split()[2] == "TERM"
    assert {number: note.read_text() for number, note in notes.items() if number != first} == {n: text for n, text in begun.items() if n != first}
    slurm.run(["scancel", str(array)], check=True)
