"""The rows of the fault matrix that a plain script shows, done to stock Horovod's elastic run (``scripts/peers/stock_elastic.py``): what it does."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from netlab import HostProcess, Lab
from rig import environ, environment, kill

PEER = Path(__file__).resolve().parents[2] / "scripts" / "peers" / "stock_elastic.py"
LIMIT_S = 90.0  # what has not happened by then is "never"
START_S = 180.0
WARM = 6


class NotStarted(Exception):
    """Stock Horovod did not come to train."""


@dataclass(frozen=True)
class Row:
    """A row of the peer's file."""

    step: int
    rank: int
    size: int
    host: str
    pid: int
    norm: float


class Stock:
    """A stock elastic job: its discovery script may be edited."""

    def __init__(self, lab: Lab, folder: Path, hosts: list[str]) -> None:
        self.lab, self.folder = lab, folder
        folder.mkdir(parents=True)
        self.file, self.log_file, script = folder / "rows.csv", folder / "log.txt", folder / "hosts.sh"
        self._hosts = folder / "hosts.txt"
        self.set_hosts(hosts)
        script.write_text(f"#!/bin/sh\ncat {self._hosts}\n")
        script.chmod(0o755)
        words = [str(PEER), "--record", str(self.file), "--steps", "1000000", "--norms"]
        sizes = ["-np", str(len(hosts)), "--min-np", "1", "--max-np", "3", "--host-discovery-script", str(script)]
        argv = ["horovodrun", *sizes, "--gloo", "--network-interface", "eth0", sys.executable, *words]
        log = self.log_file.open("w")
        self.process: HostProcess = lab.popen("node1", argv, env=environment(folder), stdout=log, stderr=log)

    def set_hosts(self, hosts: list[str]) -> None:
        self._hosts.write_text("".join(f"{host}:1\n" for host in hosts))

    def rows(self) -> list[Row]:
        if not self.file.exists():
            return []
        lines = [line.split(",") for line in self.file.read_text().split("\n")[:-1]]
        return [Row(int(step), int(rank), int(size), host, int(pid), float(norm)) for step, rank, size, host, pid, norm in lines]

    def workers(self) -> dict[str, int]:
        """Host -> process id of its worker, as this machine sees it."""
        mark = f"HOROYOLO_FAULTS={self.folder}".encode()
        found = {}
        for host in self.lab.hosts:
            for pid in self.lab.processes(host):
                if mark in environ(pid) and any(variable.startswith(b"HOROVOD_RANK=") for variable in environ(pid)):
                    found[host] = pid  # the last: shells and env come before
        return found

    def wait(self, found: Callable[[list[Row]], bool], limit_s: float = LIMIT_S) -> float | None:
        """Seconds until the rows are as wanted; None: never, or it ended."""
        began_s = time.monotonic()
        while not found(self.rows()):
            if self.process.poll() is not None or time.monotonic() - began_s > limit_s:
                return None
            time.sleep(0.01)
        return time.monotonic() - began_s

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        mark = f"HOROYOLO_FAULTS={self.folder}".encode()
        for host in self.lab.hosts:
            self.lab.heal(host)
            for pid in self.lab.processes(host):
                if mark in environ(pid) or str(self.folder).encode() in b" ".join(environ(pid)):
                    kill(pid)


@contextmanager
def stock(lab: Lab, folder: Path, hosts: list[str]) -> Iterator[Stock]:
    """A job that trains on all of its hosts."""
    job = Stock(lab, folder, hosts)
    try:
        if job.wait(lambda rows: any(row.step >= WARM and row.size == len(hosts) for row in rows), START_S) is None:
            raise NotStarted(f"stock Horovod did not start: {job.log_file.read_text()[-2000:]}")
        yield job
    finally:
        job.end()


ALL = ["node1", "node2", "node3"]


def after(job: Stock, size: int, fault: Callable[[], object], limit_s: float = LIMIT_S) -> str:
    """What happens after a fault: seconds to the next step by ``size`` workers, and steps done again."""
    fault()
    before = job.rows()
    last = max(row.step for row in before)
    num = len(before)
    seconds = job.wait(lambda rows: any(row.size == size for row in rows[num:]), limit_s)
    if seconds is None:
        status = job.process.poll()
        return f"never (watched for {limit_s:.0f} s)" if status is None else f"the job ended with {status}"
    first = next(row.step for row in job.rows()[num:] if row.size == size)
    return f"{seconds:.1f} s" + (f", {last + 1 - first} steps done again" if first <= last else "")


def worker_killed(lab: Lab, folder: Path) -> str:
    with stock(lab, folder, ALL) as job:
        victim = next(row.host for row in reversed(job.rows()) if row.rank == 2)
        return after(job, 2, lambda: kill(job.workers()[victim]))


def rank_zero_killed(lab: Lab, folder: Path) -> str:
    with stock(lab, folder, ALL) as job:
        victim = next(row.host for row in reversed(job.rows()) if row.rank == 0)
        return after(job, 2, lambda: kill(job.workers()[victim]))


def host_lost(lab: Lab, folder: Path) -> str:
    with stock(lab, folder, ALL) as job:

        def power_off() -> None:
            pid = job.workers()["node3"]
            lab.cut("node3")
            kill(pid)

        return after(job, 2, power_off)


def stopped_worker(lab: Lab, folder: Path) -> str:
    with stock(lab, folder, ALL) as job:
        return after(job, 2, lambda: kill(job.workers()["node3"], signal.SIGSTOP))


def host_removed(lab: Lab, folder: Path) -> str:
    with stock(lab, folder, ALL) as job:
        return after(job, 2, lambda: job.set_hosts(ALL[:2]))


def host_added(lab: Lab, folder: Path) -> str:
    with stock(lab, folder, ALL[:2]) as job:
        (folder / "slow.node3").write_text("60")
        told = after(job, 3, lambda: job.set_hosts(ALL), START_S)
        job.wait(lambda rows: len({row.rank for row in rows if row.size == 3}) == 3)
        last = max((row.step for row in job.rows() if row.size == 3), default=0)
        norms = {round(row.norm, 9) for row in job.rows() if row.step == last and row.size == 3}
        return told + ("; the workers' weights differ" if len(norms) > 1 else "")


def driver_killed(lab: Lab, folder: Path) -> str:
    with stock(lab, folder, ["node2", "node3"]) as job:
        job.process.kill()
        job.process.wait()
        time.sleep(20)
        return f"{len(job.workers())} of 2 workers on other hosts still run 20 s later"


STOCK = {
    "1": worker_killed,
    "2": rank_zero_killed,
    "3": host_lost,
    "7": stopped_worker,
    "14": host_added,
    "15": host_removed,
    "17": driver_killed,
}
