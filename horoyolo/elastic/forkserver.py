"""Workers forked from a process that has imported what they need: one that takes a dead one's place is there in a fraction of the time, and
the workers of a host share the memory of their libraries.

The process (``horoyolo/warm.py``) runs beside the agent of each host, with the job's environment. Over the socket whose number is in FORKS it
says ``{"is": "warm"}`` when its imports are done; then each request has one answer: ``{"fork": words, "env": variables}``, sent with the worker's
end of its channel, ``{"pid": N}``, null where there is no room for a fork; ``{"reap": pid}``, for a worker that has ended, ``{"status": N}``,
negative for a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from horoyolo.elastic.channel import FD

FORKS = "HOROYOLO_FORKS_FD"
MODULE = ["-m", "horoyolo.warm"]
COMMAND = ["-m", "horoyolo"]  # what it can run in a fork; behind it come words of the command line
MESSAGE_BYTES = 2**16
ANSWER_S = 5.0  # a server that takes longer hangs
ARG_START, ARG_END = 45, 46  # in /proc/PID/stat, behind the name: proc(5)


# -- the agent's side


class Forked:
    """A worker that was forked: the part of ``subprocess.Popen`` that the agent uses."""

    def __init__(self, pid: int, server: ForkServer) -> None:
        self.pid = pid
        self._server = server

    def send_signal(self, number: int) -> None:
        """Its number stays its own until ``wait``."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status, negative for a signal, of a worker that has ended. Where the server is gone it is not known: as if killed."""
        with contextlib.suppress(ServerGone):
            return int(self._server.ask({"reap": self.pid})["status"])
        return -signal.SIGKILL


class ServerGone(Exception):
    """The server has ended."""


class ForkServer:
    """The server of one host and one job. ``channel`` becomes readable when it is warm, and when it has ended."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        """``argv``: what a worker runs, ``can_fork`` of it; ``env``: what all workers have (OSError: it can't be started)."""
        self.words = list(argv[3:])
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(ANSWER_S)
        with theirs:
            self._process = subprocess.Popen(
                _argv_as_long_as(argv),
                env={**env, FORKS: str(theirs.fileno())},
                cwd=cwd,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
            )

    def hear_warm(self) -> bool:
        """Reads what makes the channel readable: whether the server is warm; else it has ended."""
        return bool(self.channel.recv(MESSAGE_BYTES))

    def fork(self, env: Mapping[str, str], channel: socket.socket) -> Forked | None:
        """A new worker with these variables more, which has ``channel``; None where there is no room for a fork (ServerGone: nobody forks)."""
        answer = self.ask({"fork": self.words, "env": dict(env)}, [channel.fileno()])
        return Forked(answer["pid"], self) if answer["pid"] else None

    def ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """The answer to a request, once the server is warm (ServerGone)."""
        try:
            socket.send_fds(self.channel, [json.dumps(request).encode()], descriptors)
            answer = self.channel.recv(MESSAGE_BYTES)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.channel.shutdown(socket.SHUT_RDWR)  # an answer that comes late would be taken for that of the next request
            raise ServerGone from error
        if not answer:
            raise ServerGone
        return json.loads(answer)

    def close(self) -> None:
        """Ends the server; its workers go on."""
        self.channel.close()
        self._process.kill()
        self._process.wait()


def can_fork(argv: Sequence[str]) -> bool:
    """Whether a worker with these words is the project's own command."""
    return list(argv[1:3]) == COMMAND


def _argv_as_long_as(argv: Sequence[str]) -> list[str]:
    """The server's words, with as many bytes as a worker's where these are more: its forks can then show theirs (``show_as``)."""
    own = [argv[0], *MODULE]
    spare = len(_in_memory(argv)) - len(_in_memory(own)) - 1
    return [*own, " ".join(argv[3:]).encode()[:spare].decode(errors="ignore").ljust(spare)] if spare > 0 else own


def _in_memory(argv: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(word) + b"\0" for word in argv)


# -- the server's side


def serve(control: socket.socket) -> tuple[list[str], dict[str, str]] | None:
    """Answers the agent until it is gone; None then. Returns in every fork too, with a worker's words and variables."""
    control.send(json.dumps({"is": "warm"}).encode())
    while True:
        part, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
        if not part:
            return None
        request = json.loads(part)
        if "reap" in request:
            answer: dict[str, int | None] = {"status": os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])}
        else:
            pid = _fork()
            if pid == 0:
                os.setsid()
                control.close()
                return request["fork"], {**request["env"], FD: str(descriptors[0])}
            os.close(descriptors[0])
            answer = {"pid": pid}
        control.send(json.dumps(answer).encode())


def _fork() -> int | None:
    try:
        return os.fork()
    except OSError:  # too many processes, or too little memory for another
        return None


def show_as(argv: Sequence[str]) -> None:
    """Has this process show these words where processes are listed (ps, pkill), if there are exactly as many bytes for them as they need."""
    numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end, words = int(numbers[ARG_START]), int(numbers[ARG_END]), _in_memory(argv)
    if start and end - start == len(words):
        ctypes.memmove(start, words, len(words))
