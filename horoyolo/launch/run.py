"""Starts a job on its hosts and stays with it to its end."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from horoyolo.config import InputError
from horoyolo.launch import agent
from horoyolo.launch.command import build_command, launcher_folder
from horoyolo.launch.environment import launcher_env, python_words
from horoyolo.launch.hosts import Host
from horoyolo.launch.job import Job
from horoyolo.launch.remote import LaunchError, is_this_machine, ssh_argv
from horoyolo.launch.session import ssh_to
from horoyolo.launch.slurm import SlurmOptions, srun_command
from horoyolo.launch.status import STATUS_DIR, job_status
from horoyolo.signals import heeded_requests, leave_lost_terminal

POLL_S = 0.05
SECOND_SIGNAL_S = 2.0  # a signal sooner than that after the first is the same wish: terminals and launchers often send it twice
GRACE_S = 15.0  # horovodrun itself takes up to 10 s to end its workers
AGENT_START_S = 20.0
ALIVE_EVERY_S = agent.LEASE_S / 5


def new_status_dir() -> Path:
    """A name for the status folder of a job, which its agents make on each host, or together where TMPDIR is the same for several."""
    return Path(tempfile.gettempdir()) / f"horoyolo-job-{secrets.token_hex(8)}"


def job_command(job: Job, hosts: Sequence[Host], launcher: str, options: SlurmOptions | None = None) -> list[str]:
    """The words that start a job, by srun too; ``options`` are for that one. Raises InputError as ``build_command`` does."""
    return srun_command(job, hosts, options or SlurmOptions()) if launcher == "slurm" else build_command(job, hosts, launcher)


def run_job(job: Job, hosts: Sequence[Host], launcher: str = "horovodrun", options: SlurmOptions | None = None) -> int:
    """Run the workers and return their exit status: 0 done, 1 failed or killed, 2 bad input, 75 stopped on request.

    The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP is handed to the workers, which then stop at an agreed step; another one, at least two seconds
    later, kills them. No process of the job outlives this call, on any host, nor this process itself. Call it from the main thread; ``job.env``
    names the status folder.

    Raises InputError when the launcher is not known or not installed, LaunchError when a host can't be used.
    """
    argv = job_command(job, hosts, launcher, options)
    env = launcher_env(job, hosts, launcher)
    program = shutil.which(argv[0], path=env["PATH"])
    if program is None:
        raise InputError(f"{argv[0]} is not installed but needed for {job.num_workers} workers: run scripts/setup.sh, or take -np 1")
    with SignalLog() as signals, _started_agents(job, hosts, launcher) as agents:
        # In a session of its own, so that Ctrl-C reaches the workers through here alone.
        folder = launcher_folder(hosts, launcher)
        process = subprocess.Popen(argv, executable=program, env=env, cwd=folder, start_new_session=True)
        stopped = _attend(process, agents, signals)
        agents.end()
        return job_status([*agents.statuses, 75 if stopped else process.returncode, *([1] if agents.lost else [])])


class SignalLog:
    """While it is open, requests to stop are only noted."""

    def __init__(self) -> None:
        self.first: int | None = None  # number of the first signal
        self.insisted = False  # another one came at least SECOND_SIGNAL_S after the first
        self._first_s = 0.0

    def __enter__(self) -> SignalLog:
        self._previous = {number: signal.signal(number, self._note) for number in heeded_requests()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        leave_lost_terminal()
        if number == signal.SIGHUP:
            number = signal.SIGTERM  # which workers heed even where they were started with SIGHUP ignored
        if self.first is None:
            self.first, self._first_s = number, time.monotonic()
        elif time.monotonic() - self._first_s >= SECOND_SIGNAL_S:
            self.insisted = True


class _Agents:
    """The agents of all hosts of a job, and what they told: see ``agent.py`` for what is said.

    A process is the line to the agent of a host, or to those of all hosts of an allocation.
    """

    def __init__(self, processes: dict[str, subprocess.Popen]) -> None:
        self.lost: list[str] = []  # hosts whose agent ended by itself
        self.num_ready = dict.fromkeys(processes, 0)  # agents
        self.num_workers = 0  # that have announced themselves
        self._num_answers = 0  # of agents, to a signal
        self.statuses: list[int] = []
        self._processes = processes
        self._unread = dict.fromkeys(processes, b"")
        self._alive_s = time.monotonic()
        self._selector = selectors.DefaultSelector()
        for host, process in processes.items():
            assert process.stdout is not None
            self._selector.register(process.stdout, selectors.EVENT_READ, host)

    @property
    def have_answered(self) -> bool:
        """Whether each agent that was handed a signal has told which workers there were."""
        return self._num_answers == sum(self.num_ready.values())

    def listen(self, timeout_s: float) -> None:
        """Take in what agents say, for ``timeout_s`` at most, and keep them alive."""
        for key, _ in self._selector.select(timeout_s):
            self._hear(key.data)
        if time.monotonic() - self._alive_s > ALIVE_EVERY_S:
            self._alive_s = time.monotonic()
            self.tell(agent.ALIVE)

    def tell(self, line: str) -> None:
        """Say something to all agents."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # a lost one is noticed by its silence
                process.stdin.write(f"{line}\n".encode())
                process.stdin.flush()

    def end(self) -> None:
        """Have the agents kill what is left of the job and leave; takes in their last words."""
        if not self._selector.get_map():
            return
        self.tell(agent.END)
        lost = list(self.lost)
        end_s = time.monotonic() + GRACE_S
        while self._selector.get_map() and time.monotonic() < end_s:
            self.listen(POLL_S)
        self.lost = lost
        self.close()

    def close(self) -> None:
        """Close the lines: an agent that still listens ends its host's part of the job. A line that does not end in time is cut off."""
        self._selector.close()
        for process in self._processes.values():
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        end_s = time.monotonic() + GRACE_S  # for all of them together
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _hear(self, host: str) -> None:
        stream = self._processes[host].stdout
        assert stream is not None
        words = stream.read1()  # type: ignore[attr-defined]  # a BufferedReader
        if not words:
            self._selector.unregister(stream)
            self.lost.append(host)
            return
        *lines, self._unread[host] = (self._unread[host] + words).split(b"\n")
        for line in lines:
            word, _, number = line.decode(errors="replace").partition(" ")  # what a log-in shell prints comes along
            if word == agent.READY:
                self.num_ready[host] += 1
            self.num_workers += word == agent.WORKER
            self._num_answers += word == agent.SIGNALLED
            if word == agent.STATUS:
                self.statuses.append(int(number))


def _agent_lines(job: Job, hosts: Sequence[Host], launcher: str) -> dict[str, tuple[list[str], int]]:
    """Host -> what starts its agent, and how many agents that is: one here, where the launcher runs, and one on each other host.

    In an allocation of Slurm one srun starts those of all nodes, hands what it reads to each of them and puts together what they say; nodes
    need no sshd then.
    """
    command = [sys.executable, "-m", "horoyolo.launch.agent", job.env[STATUS_DIR]]
    if launcher == "slurm":
        names = ",".join(host.name for host in hosts)
        step = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", f"--nodelist={names}", f"--chdir={job.cwd}"]
        return {"the allocation": (["srun", "--overlap", "--mpi=none", "--cpu-bind=none", *step, *command], len(hosts))}
    lines = {"localhost": (command, 1)}
    for host in hosts:
        if not is_this_machine(host.name):
            lines[host.name] = (ssh_argv(host.name, ["env", "-C", job.cwd, *python_words(job.env), *command], ssh_to(host, job.ssh)), 1)
    return lines


@contextlib.contextmanager
def _started_agents(job: Job, hosts: Sequence[Host], launcher: str) -> Iterator[_Agents]:
    """The agents of all hosts, ready; LaunchError when one does not start."""
    lines = _agent_lines(job, hosts, launcher)
    with tempfile.TemporaryDirectory(prefix="horoyolo-agents-") as name:
        complaints = {where: Path(name) / str(number) for number, where in enumerate(lines)}
        processes = {}
        for where, (argv, _) in lines.items():
            with complaints[where].open("wb") as errors:
                processes[where] = subprocess.Popen(
                    argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
                )
        agents = _Agents(processes)
        try:
            end_s = time.monotonic() + AGENT_START_S
            while time.monotonic() < end_s and not agents.lost and (missing := _missing(agents, lines)):
                agents.listen(POLL_S)
            for where in agents.lost or missing:
                words = complaints[where].read_text(errors="replace").strip().splitlines()
                why = words[-1] if words else f"no answer within {AGENT_START_S:.0f} s"
                raise LaunchError(f"{where} can't be used: {why} (horoyolo doctor looks closer)")
            yield agents
        finally:
            agents.close()


def _missing(agents: _Agents, lines: dict[str, tuple[list[str], int]]) -> list[str]:
    return [where for where, (_, wanted) in lines.items() if agents.num_ready[where] < wanted]


def _attend(process: subprocess.Popen, agents: _Agents, signals: SignalLog) -> bool:
    """Wait for the launcher to end, passing signals on to the workers. Whether it was ended on request before workers had anything to save."""
    told, stopped = False, False
    while process.poll() is None:
        if signals.insisted:
            agents.end()
            end_process(process)
        elif agents.lost:
            print(f"horoyolo: lost {', '.join(agents.lost)}: ending the job", file=sys.stderr)
            end_process(process)
        elif signals.first is not None and not told:
            told = True
            agents.tell(f"{agent.SIGNAL} {signals.first}")
        elif told and agents.have_answered and not agents.num_workers:
            stopped = True
            end_process(process)  # no worker has come far enough to have something to save
        else:
            agents.listen(POLL_S)
    return stopped


def end_process(process: subprocess.Popen) -> None:
    """Ends a program that was started from here, by force where it takes too long; one that has ended is left alone."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
