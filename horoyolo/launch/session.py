"""A probe on a host, asked over ssh, and why ssh did not get there."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from horoyolo.launch.environment import python_words
from horoyolo.launch.hosts import Host
from horoyolo.launch.probe import MARK
from horoyolo.launch.remote import Ssh, is_this_machine, ssh_argv

PROBE = Path(__file__).with_name("probe.py")
CONNECT_LIMIT_S = 30.0  # ssh itself gives up after 10 s, but a log-in may hang behind it, in a dead home folder, say
SSH_FAILED = 255


class Unreachable(Exception):
    """A host that can't be asked: what was seen, and what to do about it."""

    def __init__(self, check: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.check = check  # ssh or python
        self.message = message
        self.remedy = remedy


class Session:
    """A probe that runs on a host until the session is closed; one request at a time."""

    def __init__(self, host: Host, python: str, ssh: Ssh) -> None:
        self._host = host
        source = PROBE.read_bytes()
        boot = f"import sys; exec(compile(sys.stdin.buffer.read({len(source)}), 'probe', 'exec'))"
        # Where the workers' Python is missing, the rest can still be looked at with the system's.
        script = f'python={shlex.quote(python)}; [ -x "$python" ] || python=python3; exec "$python" -u -c {shlex.quote(boot)}'
        command = ["sh", "-c", script]
        there = ["env", *python_words(os.environ), *command]
        argv = command if is_this_machine(host.name) else ssh_argv(host.name, there, ssh_to(host, ssh))
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self._complaint = b""
        self._reader = threading.Thread(target=self._read_complaint, daemon=True)
        self._reader.start()
        self._rest = b""
        self._write(source)

    def ask(self, do: str, limit_s: float = CONNECT_LIMIT_S, **request: Any) -> dict[str, Any]:
        """The answer of the probe; it has the key ``error`` where the request failed. Raises Unreachable when none comes in time."""
        self._write(json.dumps({"do": do, **request}).encode() + b"\n")
        deadline = time.monotonic() + limit_s
        while True:
            line = self._line(deadline)
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])

    def hang_up(self) -> None:
        """Let the probe end, without waiting for it."""
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def close(self) -> None:
        """End the probe, and ssh with it."""
        self.hang_up()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(2)
        for stream in (self._process.stdout, self._process.stderr):
            if stream and not self._reader.is_alive():
                stream.close()

    def _write(self, content: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it ended: reading will tell why
            self._process.stdin.write(content)
            self._process.stdin.flush()

    def _line(self, deadline: float) -> str:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                remedy = (
                    f"see whether `ssh {self._host.name} true` ends; a start-up file of the shell there or a dead network file system may hold it"
                )
                raise Unreachable("ssh", "ssh got no answer in time", remedy)
            part = self._process.stdout.read1(2**16)  # type: ignore[attr-defined]
            if not part:
                status = self._process.wait()
                self._reader.join(2)
                raise explain(self._host, status, self._complaint.decode("utf-8", "replace"))
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _read_complaint(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._complaint = (self._complaint + line)[-8000:]


def ssh_to(host: Host, ssh: Ssh) -> Ssh:
    """How to log in to this host: its own port where the host list gives one."""
    return replace(ssh, port=host.port or ssh.port)


# What ssh says (in lower case), what it means, and what helps; the first that fits is taken.
SSH_FAILURES = (
    (
        "could not resolve hostname",
        "the name does not resolve on this machine",
        "correct it in the host list, or add it to DNS or to /etc/hosts here",
    ),
    (
        "remote host identification has changed",
        "its ssh host key has changed",
        "find out why; if it was set up anew: ssh-keygen -R {address}, then ssh {host} once by hand",
    ),
    ("host key verification failed", "its ssh host key is not known here", "ssh {host} once by hand and accept its key"),
    ("permission denied", "ssh refused the log-in (permission denied)", "ssh-copy-id {host}, here and as this user: no password may be asked for"),
    (
        "connection refused",
        "ssh refused: no sshd listens on port {port}",
        "start it on {host} (systemctl start ssh), or correct the port in the host list",
    ),
    ("connection timed out", "ssh timed out: the host is down or a firewall drops port {port}", "switch {host} on, or take it out of the host list"),
    ("operation timed out", "ssh timed out: the host is down or a firewall drops port {port}", "switch {host} on, or take it out of the host list"),
    ("no route to host", "no route to it: the host is down or cut off", "switch {host} on and see to its network, or take it out of the host list"),
    ("network is unreachable", "its network can't be reached from here", "see to the routes of this machine, or correct the name's address"),
    ("kex_exchange_identification", "sshd hung up at once", "see sshd's log on {host}: overloaded (MaxStartups), or it denies this address"),
    ("not responding", "the connection broke off", "see whether {host} is still up, and its network"),
    ("connection closed", "sshd hung up", "see sshd's log on {host}"),
    ("connection reset", "sshd hung up", "see sshd's log on {host}"),
)


def explain(host: Host, status: int, complaint: str) -> Unreachable:
    """What the end of an ssh or of what ran under it means, from its exit status and what it wrote to standard error."""
    lines = [line for line in complaint.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit status {status}"
    if status == SSH_FAILED and not is_this_machine(host.name):
        port = host.port or 22
        address = host.name if port == 22 else f"'[{host.name}]:{port}'"
        for sign, message, remedy in SSH_FAILURES:
            if sign in complaint.lower():
                return Unreachable("ssh", message.format(port=port), remedy.format(host=host.name, address=address))
        return Unreachable("ssh", f"ssh failed: {last}", f"see what `ssh -v {host.name} true` says")
    if status == 127:
        wanted = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return Unreachable("python", f"there is no Python: {last}", f"install {wanted} on {host.name}")
    return Unreachable("ssh", f"the probe ended with status {status}: {last}", f"see what `ssh {host.name} python3 --version` says")
