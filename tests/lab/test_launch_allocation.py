"""``horoyolo launch --slurm`` inside an allocation: srun starts the workers and the agents beside them, no host needs an sshd."""

from __future__ import annotations

from pathlib import Path

from netlab import HostProcess
from slurmlab import Slurm
from training import ENV, HOROYOLO, TIMEOUT_S, check_same_run, steps, train_words, wait_until, workers

ALLOCATE = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1"]


def start(slurm: Slurm, job: list[str], folder: Path) -> HostProcess:
    log = (folder / "log.txt").open("w")
    argv = [*ALLOCATE, *HOROYOLO, "launch", "--slurm", "--", *job]
    return slurm.lab.popen("node1", argv, env=ENV, cwd=folder, stdout=log, stderr=log, text=True)


def launcher(slurm: Slurm) -> int:
    """The process id of `horoyolo launch` itself."""
    (pid,) = slurm.lab.run("node1", ["pgrep", "-f", f"^{HOROYOLO[0]} -m horoyolo launch"], check=True).stdout.split()
    return int(pid)


def test_the_same_run_on_two_nodes(slurm: Slurm, dataset: Path, alone: list[dict[str, str]], tmp_path: Path) -> None:
    for host in slurm.lab.hosts:
        slurm.lab.stop_sshd(host)
    assert start(slurm, train_words(dataset, tmp_path), tmp_path).wait(TIMEOUT_S) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    check_same_run(steps(tmp_path / "run"), alone, num_workers=2)


def test_a_request_to_stop_leaves_a_checkpoint(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    job = train_words(dataset, tmp_path, epochs=1000)
    process = start(slurm, job, tmp_path)
    wait_until(lambda: steps(tmp_path / "run"), process)
    slurm.lab.run("node1", ["kill", "-TERM", str(launcher(slurm))], check=True)
    assert process.wait(TIMEOUT_S) == 75, (tmp_path / "log.txt").read_text()[-3000:]
    assert not any(workers(slurm.lab, job).values())
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_no_worker_outlives_a_killed_launcher(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    job = train_words(dataset, tmp_path, epochs=1000)
    process = start(slurm, job, tmp_path)
    wait_until(lambda: steps(tmp_path / "run"), process)
    slurm.lab.run("node1", ["kill", "-KILL", str(launcher(slurm))], check=True)
    wait_until(lambda: not any(workers(slurm.lab, job).values()), timeout_s=30)
