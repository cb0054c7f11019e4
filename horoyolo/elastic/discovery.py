"""Where the hosts of an elastic job come from, asked again and again while it runs: a hostfile, a program, Slurm or Kubernetes.

An answer counts when it is a list of hosts, at least one of them with a known name, and when it came twice in a row: a file may be read while
an editor writes it. Whatever else happens (an error, nonsense, nothing, no answer in time), the last good list holds. It is asked in a thread of
its own, so that a hanging program or name server holds nobody up; names are looked up there alone. What a name was found to mean holds as long as
it is in the list: no host leaves because name servers have a bad moment.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from horoyolo.config import InputError
from horoyolo.launch.hosts import Host, is_address_6, parse_hostfile, read_hostfile, slurm_hosts
from horoyolo.launch.remote import is_local, is_this_machine, this_machine

LIMIT_S = 10.0  # for a program's answer
KUBERNETES = "/etc/mpi/discover_hosts.sh"  # which the MPI Operator keeps up to date: the names of the pods that run
BARE = re.compile(r"^[ \t]*([^\s:=#]+)[ \t]*(#.*)?$", re.MULTILINE)  # a line that names a host without a number
# States of nodes that run their jobs, with the signs that sinfo puts behind them: for jobs that end there (+), plans (-), a booting (#, @, ^),
# maintenance ($) or a power-down (!) to come. `*` (does not answer), `~` and `%` (off, going off) are none of them.
UP = re.compile(r"(allocated|mixed|idle|completing|reserved|draining|planned|maint)[-+$@#^!]*")

Ask = Callable[[], list[Host]]


class DiscoveryError(Exception):
    """There is no good list this time: one line that says why."""


def ask_hostfile(path: str, slots_per_host: int | None) -> Ask:
    """The hosts of a file that may be edited. Asking raises InputError."""

    def ask() -> list[Host]:
        if slots_per_host is None:
            return read_hostfile(path)
        try:
            return parse_hostfile(with_slots(Path(path).read_text(encoding="utf-8-sig"), slots_per_host), path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"hostfile {path!r} can't be read: {error}") from error

    return ask


def ask_program(argv: Sequence[str], slots_per_host: int | None) -> Ask:
    """The hosts that a program prints, ``HOST:SLOTS`` one a line. Asking raises DiscoveryError and InputError.

    A name without a number is refused, since a message such as ``error`` looks the same, unless ``slots_per_host`` says that names are what
    the program prints.
    """

    def ask() -> list[Host]:
        text = run(argv)
        bare = BARE.search(text)
        if bare and slots_per_host is None:
            raise DiscoveryError(f"{shlex.join(argv)}: read {bare[1]!r}; HOST:SLOTS is wanted, or --slots-per-host for lists of names")
        return parse_hostfile(with_slots(text, slots_per_host or 1), f"output of {shlex.join(argv)}")

    return ask


def ask_slurm(env: Mapping[str, str]) -> Ask:
    """The nodes of this allocation that are up. Asking raises DiscoveryError; this itself raises InputError outside an allocation."""
    hosts = slurm_hosts(env)
    # --all: partitions too that are hidden
    argv = ["sinfo", "--noheader", "--all", "--Node", "--responding", "--format=%N %T", "--nodes=" + ",".join(host.name for host in hosts)]

    def ask() -> list[Host]:
        states = dict(words for line in run(argv).splitlines() if len(words := line.split()) == 2)
        up = [host for host in hosts if UP.fullmatch(states.get(host.name, ""))]
        if not up:
            raise DiscoveryError(f"sinfo says that no node of the allocation is up: {states}")
        return up

    return ask


def with_slots(text: str, slots_per_host: int) -> str:
    """A list of hosts in which every host that is named without a number gets this one."""
    return BARE.sub(rf"\1:{slots_per_host}", text)


def run(argv: Sequence[str], limit_s: float = LIMIT_S) -> str:
    """What a program prints. Raises DiscoveryError when it fails, says nothing or takes too long; it is ended then, its children with it."""
    name = shlex.join(argv)
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        raise DiscoveryError(f"{name} can't be run: {error.strerror}") from error
    try:
        text, complaint = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise DiscoveryError(f"{name} gave no answer within {limit_s:.0f} s") from None
    finally:
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
    if process.returncode:
        last = (complaint.strip().splitlines() or [""])[-1]
        raise DiscoveryError(f"{name} ended with status {process.returncode}{': ' if last else ''}{last}")
    if not text.strip():
        raise DiscoveryError(f"{name} printed nothing")
    return text


class Names:
    """What hosts' names mean on this machine. Other hosts are known by an IPv4 address: Horovod's workers look each other up by that."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}

    def learn(self, names: Iterable[str]) -> None:
        """Look up those of these names that are not known yet, and forget all others."""
        self._addresses = {name: address for name in names if (address := self._addresses.get(name) or _look_up(name))}

    def address(self, name: str) -> str:
        """The numeric address of a known name, '' for others."""
        return self._addresses.get(name, "")

    def reaches(self, name: str) -> bool:
        """Whether workers can be sent to a host."""
        return self.is_here(name) or bool(self.address(name) and not is_address_6(self.address(name)))

    def is_here(self, name: str) -> bool:
        """Whether a name is this machine's."""
        return is_local(name) or bool(self.address(name) and is_this_machine(self.address(name)))


def usable(hosts: Sequence[Host], names: Names) -> list[Host]:
    """The hosts whose names are known; this machine is one host of one name, whatever it is called. Raises DiscoveryError when none is left."""
    mine = [host for host in hosts if names.is_here(host.name)]
    here = [Host(this_machine(), sum(host.slots for host in mine))] if mine else []
    found = [here[0] if host in mine else host for host in hosts if host in mine[:1] or (host not in mine and names.reaches(host.name))]
    if not found:
        raise DiscoveryError(f"no host with a known IPv4 address among {', '.join(host.name for host in hosts)}")
    return found


def _look_up(name: str) -> str:
    """The first address of a name, one of IPv4 where there is one; '' when it has none."""
    try:
        found = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # the latter for what is no name at all, such as a..b
        return ""
    return str(min(found, key=lambda each: each[0] != socket.AF_INET)[4][0])


class Discovery:
    """The list of hosts as it is known now, kept up to date by a thread that asks every ``every_s`` seconds."""

    def __init__(self, ask: Ask, every_s: float, tell: Callable[[str], None]) -> None:
        """``tell`` is called from the thread with a line when asking begins to fail, for each new reason, and when it works again."""
        self._ask = ask
        self._every_s = every_s
        self._tell = tell
        self._hosts: list[Host] = []
        self._heard: list[Host] | None = None
        self._trouble = ""
        self._names = Names()
        self._unknown: list[str] = []
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to ask."""
        threading.Thread(target=self._run, daemon=True).start()

    def hosts(self) -> list[Host]:
        """The last good list; empty before the first."""
        return self._hosts

    def address(self, name: str) -> str:
        """The numeric address of a host of the list, without asking anybody; '' where there is none."""
        return self._names.address(name)

    def close(self) -> None:
        """Ask no more; does not wait for an answer that is still to come."""
        self._closed.set()

    def ask_once(self) -> None:
        """Take in one answer. What holds until it came twice is the list before; the first one counts at once."""
        trouble = ""
        try:
            named = self._ask()
            self._names.learn({host.name for host in (*named, *self._hosts)})
            unknown = [host.name for host in named if not self._names.reaches(host.name)]
            if unknown and unknown != self._unknown:
                self._tell(f"hosts: {', '.join(unknown)} left out: no IPv4 address of such a name is known here")
            self._unknown = unknown
            heard = usable(named, self._names)
            if heard == self._heard or not self._hosts:
                self._hosts = heard
            self._heard = heard
        except (InputError, DiscoveryError) as error:
            trouble = str(error)
        if trouble != self._trouble:
            kept = f"{len(self._hosts)} hosts as before" if self._hosts else "still none"
            self._tell(f"hosts: {trouble}; {kept}" if trouble else "hosts: the list can be read again")
        self._trouble = trouble

    def _run(self) -> None:
        while not self._closed.is_set():
            self.ask_once()
            self._closed.wait(self._every_s)
