"""What the launcher runs on each host of a job, beside the workers: it passes on their notes, hands them signals, and outlives them.

``python -m horoyolo.launch.agent FOLDER`` makes sure of the folder in which this host's workers leave notes (``status.py``) and talks in lines
over its own input and output, which ssh carries: no port is open and no secret is needed. It says ``ready``, ``worker PID`` and ``status N``; it
is told ``alive``, again and again, ``signal N``, for every worker of this host, those that announce themselves later too, and ``end``. To the
first signal it says ``signalled``, behind all workers that had announced themselves by then.

After ``end``, when its input ends (the launcher or its ssh died) or when nothing came for LEASE_S (the network is gone), it kills every
process of the job on this host and leaves. A process belongs to the job when it has the folder in its environment.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from horoyolo.launch.status import STATUS_DIR, announced_workers, make_folder, remove_notes, reported_statuses
from horoyolo.signals import REQUESTS

POLL_S = 0.1
LEASE_S = 15.0
READY, WORKER, STATUS, SIGNALLED = "ready", "worker", "status", "signalled"
ALIVE, SIGNAL, END = "alive", "signal", "end"


class Agent:
    """The agent of one host and one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wanted_signal = 0
        self._has_answered = False
        self._announced: set[int] = set()
        self._signalled: set[int] = set()
        self._passed_on: set[str] = set()

    def serve(self) -> None:
        """Answer the launcher until it says so or is gone."""
        heard_s = time.monotonic()
        unread = ""
        while time.monotonic() - heard_s < LEASE_S:
            if select.select([0], [], [], POLL_S)[0]:
                words = os.read(0, 4096).decode()
                if not words:
                    return
                heard_s = time.monotonic()
                *lines, unread = (unread + words).split("\n")
                for line in lines:
                    if line == END:
                        return
                    if line.startswith(SIGNAL):
                        self.wanted_signal = int(line.split()[1])
            self.pass_notes_on()
            self.signal_workers()

    def pass_notes_on(self) -> None:
        """Tell the launcher what workers noted since the last time."""
        for pid in announced_workers(self.folder):
            if pid not in self._announced:
                self._announced.add(pid)
                say(f"{WORKER} {pid}")
        for note, status in reported_statuses(self.folder).items():
            if note not in self._passed_on:
                self._passed_on.add(note)
                say(f"{STATUS} {status}")

    def signal_workers(self) -> None:
        """Hand the signal that was asked for to each announced worker, once."""
        if not self.wanted_signal:
            return
        waiting = self._announced - self._signalled
        there = set(job_processes(self.folder)) if waiting else set()
        for pid in waiting & there:  # the id of a worker that has ended may be somebody else's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.wanted_signal)
        self._signalled |= waiting
        if not self._has_answered:
            self._has_answered = True
            say(SIGNALLED)


def say(line: str) -> None:
    """Tell the launcher something, in one piece: srun puts together what agents of several hosts say."""
    os.write(1, f"{line}\n".encode())


def job_processes(folder: Path) -> list[int]:
    """Ids of the processes of this host that have ``folder`` as their status folder, this process excepted."""
    wanted = f"{STATUS_DIR}={folder}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or it is another user's
                if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def kill_job(folder: Path) -> None:
    """Kill every process of the job on this host, those included that are being born meanwhile."""
    end_s = time.monotonic() + LEASE_S  # one that hangs in the kernel dies when it comes out
    while (pids := job_processes(folder)) and time.monotonic() < end_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def main(folder: Path) -> None:
    """Serve one job from its beginning to its end."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)  # the launcher decides when the job ends
    make_folder(folder)
    agent = Agent(folder)
    try:
        say(READY)
        agent.serve()
    finally:
        kill_job(folder)
        with contextlib.suppress(BrokenPipeError):
            agent.pass_notes_on()
        remove_notes(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
