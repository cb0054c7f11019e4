"""Starts a job on this machine and stays with it to its end."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence, Set
from pathlib import Path
from types import FrameType

from horoyolo.config import InputError
from horoyolo.launch.command import LAUNCHERS, Job, direct_command
from horoyolo.launch.hosts import Host
from horoyolo.launch.status import STATUS_DIR, announced_workers, job_status, reported_statuses

POLL_S = 0.05
SECOND_SIGNAL_S = 2.0  # a signal sooner than that after the first is the same wish: terminals and launchers often send it twice
GRACE_S = 15.0  # horovodrun itself takes up to 10 s to end its workers
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def command_line(job: Job, hosts: Sequence[Host], launcher: str) -> list[str]:
    """What starts the workers; raises InputError when the launcher is not known. One worker needs none."""
    if launcher not in LAUNCHERS:
        raise InputError(f"unknown launcher {launcher!r} (--launcher): known are {', '.join(LAUNCHERS)}")
    return LAUNCHERS[launcher](job, hosts) if job.num_workers > 1 else direct_command(job, hosts)


def run_job(job: Job, hosts: Sequence[Host], launcher: str = "horovodrun") -> int:
    """Run the workers and return their exit status: 0 done, 1 failed or killed, 2 bad input, 75 stopped on request.

    The first SIGINT or SIGTERM is handed to the workers, which then stop at an agreed step; another one, at least two seconds later, kills
    them. No process of the job outlives this call. Call it from the main thread. Raises InputError when the launcher is not known or not
    installed.
    """
    argv = command_line(job, hosts, launcher)
    # What a virtual environment brought along is there even where nobody activated it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(argv[0], path=path)
    if program is None:
        raise InputError(f"{argv[0]} is not installed but needed for {job.num_workers} workers: run scripts/setup.sh, or take -np 1")
    with tempfile.TemporaryDirectory(prefix="horoyolo-launch-") as name, _SignalLog() as signals:
        folder = Path(name)
        env = {**os.environ, **job.env, "PATH": path, STATUS_DIR: name}
        # In a session of its own, so that Ctrl-C reaches the workers through here alone.
        process = subprocess.Popen([program, *argv[1:]], env=env, start_new_session=True, preexec_fn=_end_with_parent)
        _attend(process, folder, signals)
        _signal_workers(folder, signal.SIGKILL)  # a launcher that was killed itself may have left some
        return job_status([*reported_statuses(folder), process.returncode])


class _SignalLog:
    """While it is open, SIGINT and SIGTERM are only noted."""

    def __init__(self) -> None:
        self.first: int | None = None  # number of the first signal
        self.insisted = False  # another one came at least SECOND_SIGNAL_S after the first
        self._first_s = 0.0

    def __enter__(self) -> _SignalLog:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._first_s = number, time.monotonic()
        elif time.monotonic() - self._first_s >= SECOND_SIGNAL_S:
            self.insisted = True


def _attend(process: subprocess.Popen, folder: Path, signals: _SignalLog) -> None:
    """Wait for the launcher to end, passing signals on to the workers."""
    told: set[int] = set()
    while process.poll() is None:
        if signals.insisted:
            _signal_workers(folder, signal.SIGKILL)
            _end(process)
        elif signals.first is not None:
            told |= _signal_workers(folder, signals.first, but=told)
            if not told:
                _end(process)  # no worker has come far enough to have something to save
        time.sleep(POLL_S)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _signal_workers(folder: Path, number: int, but: Set[int] = frozenset()) -> set[int]:
    """Send a signal to the announced workers of this job, except some; gives the process ids it was meant for."""
    pids = {pid for pid in announced_workers(folder) if pid not in but}
    for pid in pids:
        try:
            # The id of a worker that has ended may be somebody else's by now.
            if f"{STATUS_DIR}={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, number)
        except OSError:
            pass  # it has ended
    return pids


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to the launcher when this process is killed; the launcher then ends its workers."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
