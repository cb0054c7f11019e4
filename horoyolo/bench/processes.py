"""Starts what a bench measures, here or on other hosts: a job by its launcher, or plain processes side by side that hear from here alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import horoyolo
from horoyolo.bench import talk
from horoyolo.config import InputError
from horoyolo.launch.command import build_command, launcher_folder
from horoyolo.launch.environment import job_env, launcher_env, worker_env
from horoyolo.launch.hosts import Host, local_hosts, take_slots
from horoyolo.launch.interface import interface_to
from horoyolo.launch.job import Job, all_local
from horoyolo.launch.remote import LaunchError, Ssh, is_this_machine, ssh_argv
from horoyolo.launch.run import end_process
from horoyolo.launch.session import ssh_to
from horoyolo.launch.start import chosen_ssh, named_hosts

LIMIT_S = 3600.0  # a job on a slow link takes long; one that hangs is not to hang for ever
# Has the kernel end a program by SIGTERM when the bench is killed; launchers then end their workers. A program and not a preexec_fn, since that
# one makes Python fork in a way that swallows a Ctrl-C which comes at the same time. (1 is PR_SET_PDEATHSIG, 15 SIGTERM.)
END_WITH_BENCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[2:])"
SHORT = {"horovodrun": "Gloo", "mpirun": "MPI"}  # launcher -> what its workers talk by
PEERS = Path(horoyolo.__file__).parents[1] / "scripts" / "peers"


@dataclass(frozen=True)
class Place:
    """Where a bench runs: hosts with the slots that are used, the interface between them, how to log in."""

    hosts: list[Host]
    nic: str  # empty on one machine
    ssh: Ssh

    @property
    def num_workers(self) -> int:
        return sum(host.slots for host in self.hosts)

    @property
    def name(self) -> str:
        """For the head of a table."""
        where = "this machine" if all_local(self.hosts) else ", ".join(host.name for host in self.hosts)
        return f"{self.num_workers} workers on {where}"

    def job(self, argv: Sequence[str], peer: bool = False) -> Job:
        """Workers with one thread each. A peer gets none of what training tells Horovod and MPI; how memory is kept is the same for all."""
        env = {**job_env(self.hosts, 1, os.environ), "OMP_NUM_THREADS": "1"}
        if peer:
            ours = worker_env(1, 1, os.environ)
            env = {name: value for name, value in env.items() if not (name in ours and name.startswith(("HOROVOD_", "OMPI_")))}
        return Job(self.num_workers, tuple(argv), env, nic=self.nic, ssh=self.ssh, cwd=str(Path.cwd()), as_root=os.geteuid() == 0)

    def argv_on(self, host: Host, argv: Sequence[str]) -> list[str]:
        """What runs a command on one of the hosts, from here."""
        return list(argv) if is_this_machine(host.name) else ssh_argv(host.name, argv, ssh_to(host, self.ssh))


def chosen_place(parsed: argparse.Namespace) -> Place:
    """What the flags of a bench say: by default ``num_here`` workers here, or one a slot of the hosts that are named (InputError: less than two)."""
    if parsed.hostfile or parsed.hosts or parsed.slurm:
        hosts = named_hosts(parsed, os.environ)
        hosts = take_slots(hosts, parsed.num_proc or sum(host.slots for host in hosts))
    else:
        hosts = local_hosts(parsed.num_proc or parsed.num_here)
    place = Place(hosts, "" if all_local(hosts) else parsed.nic or interface_to(hosts), chosen_ssh(parsed))
    if place.num_workers < 2:
        raise InputError(f"{place.num_workers} worker (-np, --hosts); an exchange needs at least two")
    return place


def peer_script(name: str) -> list[str]:
    """What runs a peer; raises InputError where they are not: the package does not carry them, a checkout does."""
    if not (PEERS / name).is_file():
        raise InputError(f"peers are measured in a checkout of the project: there is no {PEERS / name}")
    return [sys.executable, str(PEERS / name)]


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """While it is open, SIGTERM ends what runs as Ctrl-C does: with all that it has started or changed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launched(job: Job, hosts: Sequence[Host], launcher: str) -> Any:
    """What the first worker of a job reports; raises LaunchError when it does not."""
    argv = build_command(job, hosts, launcher)
    env = launcher_env(job, hosts, launcher)
    program = shutil.which(argv[0], path=env["PATH"])
    if program is None:
        raise InputError(f"{argv[0]} is not installed: run scripts/setup.sh")
    with tempfile.TemporaryFile("w+") as errors:
        folder = launcher_folder(hosts, launcher)
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        words = [sys.executable, "-I", "-S", "-c", END_WITH_BENCH, program, *argv]
        process = subprocess.Popen(words, env=env, cwd=folder, start_new_session=True, **pipes)
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"{' '.join(job.argv)}: not done after {LIMIT_S:.0f} s:\n{_tail(errors)}") from None
        finally:
            end_process(process)
        said = [words for words in map(talk.heard, output.splitlines()) if words]
        if not said:
            raise LaunchError(f"{' '.join(job.argv)} reported nothing and ended with {process.returncode}:\n{_tail(errors)}")
    return said[-1][1]


def side_by_side(place: Place, job: Job) -> list[Any]:
    """What each of some processes reports, which have no launcher and nothing in common but what they gather through here (``talk.Starter``).

    Raises LaunchError when one ends without a report.
    """
    slots = [host for host in place.hosts for _ in range(host.slots)]
    with contextlib.ExitStack() as stack:
        listener: queue.SimpleQueue[tuple[int, tuple[str, Any] | None]] = queue.SimpleQueue()
        processes = [stack.enter_context(_Process(rank, place, host, job, listener)) for rank, host in enumerate(slots)]
        names = ["127.0.0.1" if all_local(place.hosts) else host.name for host in slots]
        for rank, process in enumerate(processes):
            process.tell([rank, names])
        while True:
            said = _round(processes, listener)
            kinds = {kind for kind, _ in said}
            values = [value for _, value in said]
            if kinds == {talk.REPORT}:
                return values
            if kinds != {talk.GATHER}:
                raise LaunchError(f"{' '.join(job.argv)}: some processes reported while others still gather")
            for process in processes:
                process.tell(values)


class _Process:
    """One of several processes, on its host."""

    def __init__(self, rank: int, place: Place, host: Host, job: Job, listener: queue.SimpleQueue) -> None:
        self._host, self._errors = host, tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in __exit__
        variables = [f"{name}={value}" for name, value in sorted(job.env.items())]
        argv = place.argv_on(host, ["env", "-C", job.cwd, *variables, *job.argv])
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        self._process = subprocess.Popen(argv, start_new_session=True, **pipes)
        self.has_ended = False
        threading.Thread(target=self._listen, args=(rank, listener), daemon=True).start()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()  # it ends by itself: also the one on another host, which no signal reaches
        end_process(self._process)
        self._errors.close()

    def tell(self, value: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the listener notices
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def complaint(self) -> str:
        return f"on {self._host.name} with status {self._process.wait()}:\n{_tail(self._errors)}"

    def _listen(self, rank: int, listener: queue.SimpleQueue) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                words = talk.heard(line)
                if words:
                    listener.put((rank, words))
        listener.put((rank, None))


def _round(processes: Sequence[_Process], listener: queue.SimpleQueue) -> list[tuple[str, Any]]:
    """What each process says next, in rank order."""
    said: dict[int, tuple[str, Any]] = {}
    while len(said) < len(processes):
        for rank, process in enumerate(processes):
            if process.has_ended and rank not in said:
                raise LaunchError(f"a process of the bench ended {process.complaint()}")
        try:
            rank, words = listener.get(timeout=LIMIT_S)
        except queue.Empty:
            raise LaunchError(f"processes of the bench said nothing for {LIMIT_S:.0f} s") from None
        if words is None:
            processes[rank].has_ended = True
        else:
            said[rank] = words
    return [said[rank] for rank in range(len(processes))]


def _tail(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-2000:]
