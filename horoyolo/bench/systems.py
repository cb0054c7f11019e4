"""The ways to train on workers that may die, each started in its own way: ours, stock Horovod's, torchrun's; elastic or not."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from horoyolo.bench.processes import END_WITH_BENCH, Place, peer_script
from horoyolo.bench.record import Record, Seen
from horoyolo.config import InputError
from horoyolo.engine.hooks import STEP_COLUMNS
from horoyolo.launch.command import build_command, launcher_folder
from horoyolo.launch.environment import launcher_env, python_words
from horoyolo.launch.job import Job, all_local
from horoyolo.launch.remote import LaunchError
from horoyolo.launch.run import end_process, new_status_dir
from horoyolo.launch.status import STATUS_DIR

PORT = 29517  # of torchrun's meeting place, on the first host
MANY = 10**6  # steps or epochs: until it is ended

Command = tuple[list[str], dict[str, str], str | None]  # words, whole environment, folder


@dataclass(frozen=True)
class Size:
    """How large a step is."""

    cfg: str
    img: int
    batch: int  # images of each worker
    num_workers: int

    def words(self) -> list[str]:
        """The flags that tell a worker."""
        return ["--cfg", self.cfg, "--img", str(self.img), "--batch", str(self.batch)]


@dataclass(frozen=True)
class System:
    """One way to train: what workers run, what starts them (a command for here, or one for each host), and where steps are recorded."""

    name: str
    worker: tuple[str, ...]
    commands: Callable[[Place, Path], list[Command]]
    record: Record
    restarts: bool = False  # all workers begin anew after a death, their number stays


class Running:
    """A system that trains."""

    def __init__(self, system: System, processes: Sequence[subprocess.Popen], log: IO[str], hands: Sequence[_Hand]) -> None:
        self.system = system
        self._processes, self._log, self._hands = processes, log, hands

    def wait(self, found: Callable[[list[Seen]], Seen | None], limit_s: float) -> tuple[Seen, float]:
        """As ``Record.wait``; LaunchError also when the job has ended."""
        return self.system.record.wait(found, self._check, limit_s)

    def workers(self) -> list[tuple[int, int]]:
        """(host, process id) of each worker."""
        return [(number, pid) for number, hand in enumerate(self._hands) for pid in hand.ask("workers", self.system.worker)]

    def kill(self, worker: tuple[int, int]) -> float:
        """SIGKILL to one of ``workers``; when it was sent."""
        host, pid = worker
        self._hands[host].ask("kill", pid)
        return time.monotonic()

    def _check(self) -> None:
        if self._processes[0].poll() is not None:
            self._log.seek(0)
            raise LaunchError(f"{self.system.name} ended with {self._processes[0].returncode}:\n{self._log.read()[-2000:]}")


@contextlib.contextmanager
def running(system: System, place: Place, folder: Path) -> Iterator[Running]:
    """Starts a system; all of it has ended when the block is left."""
    mark = new_status_dir()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "log.txt").open("w+"))
        hands = [stack.enter_context(_Hand(place, number, mark)) for number in range(len(place.hosts))]
        processes = []
        for argv, env, cwd in system.commands(place, mark):
            program = shutil.which(argv[0], path=env["PATH"]) or argv[0]
            words = [sys.executable, "-I", "-S", "-c", END_WITH_BENCH, program, *argv]
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            processes.append(subprocess.Popen(words, env=env, cwd=cwd, **streams))
            stack.callback(end_process, processes[-1])
        yield Running(system, processes, log, hands)


def ours(place: Place, size: Size, data: Path, folder: Path, elastic: bool) -> System:
    """horoyolo's own training: ``launch`` with ``--min-np``, or without."""
    job = ["train", "--data", str(data), "--cfg", size.cfg, "--img", str(size.img), "--batch", str(size.batch * size.num_workers)]
    job += ["--precision", "fp32", "--workers", "0", "--epochs", str(MANY), "--project", str(folder), "--name", "run"]
    job += ["--set", f"evaluate_every={MANY}", *(["--elastic"] if elastic else [])]
    hosts = ",".join(f"{host.name}:{host.slots}" for host in place.hosts)
    where = ["--hosts", hosts, *(["--nic", place.nic] if place.nic else [])]
    sizes = ["--min-np", "1", "--max-np", str(size.num_workers)] if elastic else ["-np", str(size.num_workers)]

    def commands(place: Place, mark: Path) -> list[Command]:
        argv = [sys.executable, "-m", "horoyolo", "launch", *where, *sizes, "--", *job]
        return [(argv, {**os.environ, "OMP_NUM_THREADS": "1"}, None)]

    worker = (sys.executable, "-m", "horoyolo", *job)
    name = "horoyolo, elastic" if elastic else "horoyolo, static"
    return System(name, worker, commands, Record(folder / "run" / "steps.csv", STEP_COLUMNS.index("workers"), ()))


def stock(place: Place, size: Size, folder: Path, commit_every: int) -> System:
    """Stock Horovod: ``TorchState`` under its elastic run, or the same loop with neither where ``commit_every`` is 0."""
    rows = folder / "rows.csv"
    words = ["--record", str(rows), *size.words(), "--steps", str(MANY), "--commit-every", str(commit_every)]
    worker = (*peer_script("stock_elastic.py"), *words)

    def commands(place: Place, mark: Path) -> list[Command]:
        job = _marked(place, worker, mark)
        env, cwd = launcher_env(job, place.hosts), launcher_folder(place.hosts, "horovodrun")
        if not commit_every:
            return [(build_command(job, place.hosts, "horovodrun"), env, cwd)]
        script = folder / "hosts.sh"
        script.write_text("#!/bin/sh\n" + "".join(f"echo {shlex.quote(f'{host.name}:{host.slots}')}\n" for host in place.hosts))
        script.chmod(0o755)
        sizes = ["-np", str(size.num_workers), "--min-np", "1", "--max-np", str(size.num_workers)]
        where = ["--host-discovery-script", str(script), "--gloo", "--network-interface", place.nic or "lo"]
        return [(["horovodrun", *sizes, *where, "env", "-C", job.cwd, *worker], env, cwd)]

    name = f"stock Horovod, commit every {commit_every}" if commit_every else "stock Horovod, static"
    return System(name, worker, commands, Record(rows))


def torchrun(place: Place, size: Size, folder: Path) -> System:
    """DistributedDataParallel under torchrun: an agent on each host, which all restart their workers when one dies."""
    rows = folder / "rows.csv"
    words = ["--record", str(rows), "--snapshot", str(folder / "snapshot.pt"), *size.words(), "--steps", str(MANY)]
    worker = (*peer_script("torchrun_elastic.py"), *words)

    def commands(place: Place, mark: Path) -> list[Command]:
        first = "localhost" if all_local(place.hosts) else place.hosts[0].name
        job = _marked(place, worker, mark)
        env = {**job.env, "GLOO_SOCKET_IFNAME": place.nic or "lo"}
        started: list[Command] = []
        for host in place.hosts:
            agents = ["--nnodes", f"1:{len(place.hosts)}", "--nproc-per-node", str(host.slots), "--max-restarts", "100"]
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{PORT}", "--rdzv-id", mark.name]
            run = [sys.executable, "-m", "torch.distributed.run", *agents, *meeting, *worker[1:]]
            variables = [f"{name}={value}" for name, value in sorted(env.items())]
            started.append((place.argv_on(host, ["env", "-C", job.cwd, *variables, *run]), dict(os.environ), None))
        return started

    return System("torchrun, DDP", worker, commands, Record(rows), restarts=True)


def check_peers(place: Place) -> None:
    """Raises InputError where stock Horovod could not show anything: it gives up a whole host for each worker that dies."""
    if len(place.hosts) < 2 or any(host.slots > 1 for host in place.hosts):
        raise InputError("--peers: hosts with one worker each are wanted, such as --hosts a:1,b:1,c:1; stock Horovod leaves out a host for a worker")


def _marked(place: Place, argv: Sequence[str], mark: Path) -> Job:
    job = place.job(argv, peer=True)
    return Job(job.num_workers, job.argv, {**job.env, STATUS_DIR: str(mark)}, nic=job.nic, ssh=job.ssh, cwd=job.cwd, as_root=job.as_root)


class _Hand:
    """The line to ``hand.py`` on a host."""

    def __init__(self, place: Place, number: int, mark: Path) -> None:
        host = place.hosts[number]
        argv = [sys.executable, "-m", "horoyolo.bench.hand", str(mark)]
        self._host = host.name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in __exit__
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        command = ["env", "-C", str(Path.cwd()), *python_words(os.environ), *argv]
        self._process = subprocess.Popen(place.argv_on(host, command), start_new_session=True, **pipes)

    def __enter__(self) -> _Hand:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)  # it kills what is left there
        end_process(self._process)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def ask(self, what: str, value: Any) -> Any:
        """The answer to a request (LaunchError: none comes)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([what, value]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise LaunchError(f"{self._host} can't be used: {self._errors.read()[-500:].strip()}")
        return json.loads(line)
