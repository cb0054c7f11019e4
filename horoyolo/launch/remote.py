"""How this project reaches another host: one ssh command line, the same everywhere."""

from __future__ import annotations

import functools
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from horoyolo.launch.hosts import NAME

# Without these a host that vanished keeps its ssh, and whoever waits for it, until TCP gives up after many minutes.
KEEPALIVE = ("-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=2")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


class LaunchError(Exception):
    """A host of a job can't be used: one line that says which, why, and what to do (exit status 1)."""


@dataclass(frozen=True)
class Ssh:
    """How to log in to the hosts of a job; empty fields are left to the user's ssh configuration."""

    port: int | None = None
    identity: str = ""  # file of the private key


def is_local(host: str) -> bool:
    """Whether a host of a job is this machine, by its name; nothing is looked up."""
    return host in LOCAL_NAMES or host in (os.uname().nodename, os.uname().nodename.split(".")[0])


def is_loopback(host: str) -> bool:
    """Whether a name or an address leads each machine to itself."""
    return host in LOCAL_NAMES or host.startswith("127.")


def this_machine() -> str:
    """This machine's name for itself, where it can be one."""
    name = os.uname().nodename
    return name if NAME.fullmatch(name) else "localhost"


@functools.cache  # asked in many places of one start, and a name server may be slow
def is_this_machine(host: str) -> bool:
    """Whether a name or an address leads here: only a machine's own addresses can be bound."""
    if is_local(host):
        return True
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
    except (OSError, UnicodeError):  # unknown, or elsewhere; no name at all, such as a..b
        return False
    return True


def ssh_options(ssh: Ssh) -> list[str]:
    """The words between ``ssh`` and the host: never ask for a password, notice a dead host within seconds."""
    port = ["-p", str(ssh.port)] if ssh.port else []
    identity = ["-i", ssh.identity] if ssh.identity else []
    return ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *KEEPALIVE, *port, *identity]


def ssh_argv(host: str, command: Sequence[str], ssh: Ssh) -> list[str]:
    """What runs ``command`` on ``host``. The login shell there splits the words again, so they are quoted for it."""
    return ["ssh", *ssh_options(ssh), "--", host, shlex.join(command)]
