"""An elastic training on the lab's hosts that faults are done to, and what can be seen of it from outside."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netlab import HostProcess, Lab

PYTHON = [sys.executable, "-m", "horoyolo"]
INJECT = Path(__file__).parent / "inject"
START_S = 150.0  # from the launch to the first step, on a machine that does other things too
POLL_S = 0.01
LOSSES = ("box_loss", "obj_loss", "cls_loss")
SAME = 1e-6  # of losses, to those of the undisturbed run: they are printed with eight digits
MANY = 100_000  # epochs


class Failed(Exception):
    """What did not happen, in one line."""


@dataclass
class Control:
    """The same training by one process that nothing happens to: what every row's losses must be."""

    rows: list[dict[str, str]]

    @staticmethod
    def run(lab: Lab, data: Path, folder: Path, steps: int) -> Control:
        """Trains for so many steps."""
        log = folder / "log.txt"
        with log.open("w") as stream:
            process = lab.popen("node1", [*PYTHON, *train_words(data, folder, MANY)], env=environment(folder), stdout=stream, stderr=stream)
        while len(rows := read_rows(folder / "run" / "steps.csv")) < steps:
            if process.poll() is not None:
                raise Failed(f"the undisturbed run ended with {process.returncode}: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        process.kill()
        process.wait()
        return Control(rows)


@dataclass
class Rig:
    """A lab, a data set and an undisturbed run; rows start their jobs here."""

    lab: Lab
    data: Path
    folder: Path
    control: Control
    jobs: int = 1

    def new_job(self) -> Job:
        """A job that has not been started."""
        while (folder := self.folder / f"job-{self.jobs}").exists():
            self.jobs += 1
        return Job(self, folder)

    def job(self, hosts: str, **how: Any) -> AbstractContextManager[Job]:
        """A new job that is running; see ``running``."""
        return self.running(self.new_job(), hosts, **how)

    @contextmanager
    def running(
        self,
        job: Job,
        hosts: str,
        words: Sequence[object] = (),
        where: Sequence[object] = (),
        min_np: int = 1,
        data: Path | None = None,
        train: Sequence[str] = (),
    ) -> Iterator[Job]:
        """Starts a job on ``hosts``, lines of a hostfile, whose place ``where`` may take. All is gone afterwards.

        ``words`` are added to those of the training: ``train``, else the small one of ``train_words``.
        """
        job.edit_hosts(hosts)
        job.words = [*(train or train_words(data or self.data, job.folder, MANY)), *map(str, words), "--elastic"]
        place = [*map(str, where)] or ["--hostfile", str(job.hostfile)]
        job.argv = [*PYTHON, "launch", *place, "--min-np", str(min_np), "--max-np", "8", "--", *job.words]
        try:
            job.launch()
            yield job
        finally:
            job.end()


class Job:
    """One elastic job: its launcher, hosts, steps and processes."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig, self.lab, self.folder = rig, rig.lab, folder
        self.run_folder = self.seen_folder = folder / "run"  # as the job sees it, and where it is seen from here
        self.hostfile, self.log_file, self.faults = folder / "hosts.txt", folder / "log.txt", folder / "faults"
        self.faults.mkdir(parents=True)
        self.process: HostProcess | None = None
        self.argv: list[str] = []  # of the launcher
        self.words: list[str] = []  # of a worker

    # -- life

    def launch(self, *more_words: str) -> None:
        """Starts the launcher; again too, with ``more_words`` for workers."""
        self.argv, self.words = [*self.argv, *more_words], [*self.words, *more_words]
        log = self.log_file.open("a")
        self.process = self.lab.popen("node1", self.argv, env=environment(self.faults), stdout=log, stderr=log, text=True)

    def end(self) -> None:
        """Kills the launcher and whatever is left anywhere."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for host in self.lab.hosts:
            self.lab.heal(host)
            self.lab.unshape(host)
            for pid in self.of_job(host):
                kill(pid)

    def edit_hosts(self, hosts: str) -> None:
        """Writes the hostfile, in place."""
        self.hostfile.write_text("".join(f"{line.strip()}\n" for line in hosts.split(",")))

    # -- what is seen

    def rows(self) -> list[dict[str, str]]:
        """The rows of steps.csv, the last of each step."""
        return list({row["step"]: row for row in read_rows(self.seen_folder / "steps.csv")}.values())

    def log(self) -> str:
        """All that launcher and workers have said."""
        return self.log_file.read_text(errors="replace")

    def step(self) -> int:
        """The last step so far."""
        return max((int(row["step"]) for row in self.rows()), default=0)

    def workers(self) -> dict[str, list[int]]:
        """Host -> process ids of the workers there."""
        argv = [*PYTHON, *self.words]
        return {host: [pid for pid in self.lab.processes(host) if cmdline(pid)[: len(argv)] == argv] for host in self.lab.hosts}

    def of_job(self, host: str) -> list[int]:
        """Process ids of all on a host that belongs to this job: launcher, agents, workers and what they started."""
        mark = f"HOROYOLO_FAULTS={self.faults}".encode()
        return [pid for pid in self.lab.processes(host) if mark in environ(pid) or str(self.folder) in " ".join(cmdline(pid))]

    def writers(self) -> dict[str, list[int]]:
        """Host -> process ids of the workers that have steps.csv open: rank 0."""
        found = {host: [pid for pid in pids if "steps.csv" in open_files(pid)] for host, pids in self.workers().items()}
        return {host: pids for host, pids in found.items() if pids}

    def rank_zero(self) -> tuple[str, int]:
        """Host and process id of the worker that writes."""
        found = [(host, pid) for host, pids in self.writers().items() for pid in pids]
        if len(found) != 1:
            raise Failed(f"{len(found)} workers write steps.csv")
        return found[0]

    def follower(self) -> tuple[str, int]:
        """Host and process id of the last worker that is not rank 0."""
        writers = {pid for pids in self.writers().values() for pid in pids}
        return [(host, pid) for host, pids in self.workers().items() for pid in pids if pid not in writers][-1]

    # -- waiting

    def until(self, condition: Callable[[], Any], what: str, limit_s: float, alive: bool = True, poll_s: float = POLL_S) -> float:
        """Waits for a condition; the seconds that it took (Failed: longer than ``limit_s``, or the job ended)."""
        began_s = time.monotonic()
        while not condition():
            if alive and self.process is not None and self.process.poll() is not None:
                raise Failed(f"the job ended with {self.process.returncode} before {what}: {self.last_lines()}")
            if time.monotonic() - began_s > limit_s:
                raise Failed(f"not within {limit_s:.0f} s: {what}: {self.last_lines()}")
            time.sleep(poll_s)
        return time.monotonic() - began_s

    def train_until(self, step: int, workers: int) -> None:
        """Waits for a step, made by so many workers."""
        found = lambda: any(int(row["step"]) >= step and int(row["workers"]) == workers for row in self.rows())  # noqa: E731
        self.until(found, f"step {step} by {workers} workers", START_S)

    def next_step(self, workers: int, limit_s: float, since: int | None = None) -> float:
        """Seconds to the next step that was made by so many workers."""
        before = self.step() if since is None else since
        return self.until(
            lambda: any(int(row["step"]) > before and int(row["workers"]) == workers for row in self.rows()), f"a step by {workers} workers", limit_s
        )

    def more_steps(self, count: int, limit_s: float = START_S) -> None:
        """Waits for more steps, by however many workers."""
        wanted = self.step() + count
        self.until(lambda: self.step() >= wanted, f"step {wanted}", limit_s)

    def stop(self, limit_s: float = 90.0, number: int = signal.SIGTERM) -> int:
        """Asks the job to stop; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.wait(limit_s)

    def wait(self, limit_s: float) -> int:
        """The exit status (Failed: it does not end)."""
        assert self.process is not None
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"the job does not end within {limit_s:.0f} s: {self.last_lines()}") from None

    def last_lines(self) -> str:
        """The end of the log, for messages."""
        return " | ".join(self.log().strip().splitlines()[-4:])

    # -- proofs

    def check_agreement(self, hosts: str, workers: int) -> None:
        """Has workers leave in order, so that so many are left: they compare their weights then (Failed: it does not go on)."""
        self.edit_hosts(hosts)
        self.next_step(workers, START_S)

    def check_one_writer(self) -> None:
        """Failed where a step was noted twice, or steps not in their order."""
        noted = [int(row["step"]) for row in read_rows(self.seen_folder / "steps.csv")]
        if noted != sorted(set(noted)):
            raise Failed(f"steps.csv has steps twice or out of order: {noted}")

    def account(self) -> dict[str, Any]:
        """What the ledger proves, by ``horoyolo report``."""
        path = self.folder / "account.json"
        path.unlink(missing_ok=True)
        done = self.lab.run("node1", [*PYTHON, "report", str(self.run_folder), "--ledger", "--json", str(path)], timeout=60)
        if not path.exists():
            raise Failed(f"report --ledger: {done.stderr.strip()}")
        return json.loads(path.read_text())

    def deviation(self) -> float:
        """The largest relative difference of a loss to that of the undisturbed run (Failed: another batch or learning rate, or more steps)."""
        rows, undisturbed = self.rows(), self.rig.control.rows
        if len(rows) > len(undisturbed):
            raise Failed(f"{len(rows)} steps, the undisturbed run has {len(undisturbed)}: give it more (--control)")
        largest = 0.0
        for mine, theirs in zip(rows, undisturbed, strict=False):
            if any(mine[name] != theirs[name] for name in ("step", "epoch", "images", "batch_crc", "lr")):
                raise Failed(f"step {mine['step']} is not that of the undisturbed run: {mine} against {theirs}")
            largest = max(largest, *(abs(float(mine[name]) / float(theirs[name]) - 1) for name in LOSSES))
        return largest


def train_words(data: Path, project: Path, epochs: int) -> list[str]:
    """A small training that is the same, to the last bit, on any number of workers."""
    size = ["--cfg", "yolov5n", "--img", 64, "--batch", 16, "--precision", "fp32", "--sync-bn", "--workers", 0, "--epochs", epochs]
    # An update a step. Rates are those of a warm-up: the rest of a schedule knows the number of epochs, which the undisturbed run has more of.
    settings = ["hyp.lrf=1", "hyp.warmup_epochs=30", "hyp.lr0=0.005", "optim.nominal_batch=0", f"evaluate_every={MANY}"]
    others = [word for setting in settings for word in ("--set", setting)]
    return ["train", *map(str, [*size, *others, "--data", data, "--project", project, "--name", "run"])]


def environment(faults: Path) -> dict[str, str]:
    """One thread each, since hosts of the lab share cores; faults inside processes can be asked for."""
    path = os.pathsep.join([str(INJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HOROYOLO_FAULTS": str(faults)}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file; none where there is no file."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))  # read at once: the file grows
    except FileNotFoundError:
        return []
    return [row for row in rows if row["step"].isdigit() and (row.get("workers") or "").isdigit()]


def cmdline(pid: int) -> list[str]:
    """The words that a process was started with; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def environ(pid: int) -> list[bytes]:
    """The variables that a process was started with."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def open_files(pid: int) -> set[str]:
    """Names of the files that a process has open."""
    names = set()
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            names.add(Path(os.readlink(entry.path)).name)
    return names


def kill(pid: int, number: int = signal.SIGKILL) -> float:
    """Sends a signal; when that was."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    return time.monotonic()
