"""Several hosts on one machine: a lab of Linux namespaces joined by a switch.

Each host has its own network (interface ``eth0``), processes, mounts, host name, home, TMPDIR, /dev/shm, /etc/hosts and sshd;
the disk is common to all, as a shared file system would be. Names are node1, node2, ...; from any host ``ssh node2`` lands in the second.
The switch is a namespace too, so nothing of the machine itself is changed: neither its network nor its /etc/hosts nor anybody's home.

All processes of a lab descend from one, in whose process namespace they live: when it ends, the kernel kills the others and their network is
gone. So a lab can't outlive its owner, whatever ends that one. Labs do not see each other; any number can be up at once.

The same as a command: ``scripts/lab.sh``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUBNET = "10.77.0"  # of every lab: they can't see each other
INTERFACE = "eth0"
PREFIX = "horoyolo-lab-"
PROGRAMS = {  # what the lab runs -> Debian package
    "ip": "iproute2",
    "bridge": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
SBIN = "/usr/sbin:/sbin"
START_S = 20.0  # a daemon that has not come up by then never will
PR_SET_PDEATHSIG = 1  # from linux/prctl.h

NEW_SWITCH = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child")
NEW_HOST = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
TRIAL = "ip link add br0 type bridge && ip link add eth0 type veth peer name node1"

# The first process of a namespace: says its process id as this machine sees it (/proc is still the machine's), then sleeps and reaps orphans.
FIRST_PROCESS = """
import os, signal
print(os.readlink("/proc/self"), flush=True)
os.close(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # survives exec; the kernel then reaps
os.execlp("sleep", "sleep", "infinity")
"""
FIRST = [sys.executable, "-I", "-S", "-c", FIRST_PROCESS]

SSHD_CONFIG = """\
Port 22
PidFile /run/sshd.pid
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
UseDNS no
MaxStartups 100
SetEnv TMPDIR=/run/tmp
"""

SSH_CONFIG = """\
Host *
    IdentityFile {folder}/id
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile none
    ConnectTimeout 10
"""

# Run in a new host, whose mounts are copies that no other host sees.
HOST_SETUP = """\
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -m 755 /run/sshd
mkdir -m 1777 /run/tmp
mkdir -m 700 /run/home
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/{name}/hosts /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
if [ -d /etc/slurm ]; then mount --bind {folder}/slurm /etc/slurm; fi
hostname {name}
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
"""


class LabError(Exception):
    """What the lab could not do, in one line."""


def missing() -> str:
    """What this machine lacks for a lab, in one line; empty when a lab can be made here."""
    if sys.platform != "linux":
        return "network namespaces (Linux)"
    if os.geteuid() != 0:
        return "root (network namespaces and sshd need it)"
    absent = sorted({package for program, package in PROGRAMS.items() if not find_program(program)})
    if absent:
        return f"{', '.join(absent)} (scripts/setup_lab.sh installs them)"
    tried = subprocess.run([*NEW_HOST, "sh", "-c", TRIAL], capture_output=True, text=True, env=_environment({}), check=False)
    return f"namespaces, bridge and veth ({tried.stderr.strip().splitlines()[-1]})" if tried.returncode else ""


class HostProcess(subprocess.Popen):
    """A program on a host of the lab. Signals go to the program itself, not to the nsenter that waits for it."""

    def send_signal(self, number: int) -> None:
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.program_pid(), number)

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self.kill()  # who used it has failed and will not end it
        super().__exit__(kind, *exception)

    def program_pid(self) -> int:
        """The program's process id as this machine sees it; on the host it has another."""
        deadline_s = time.monotonic() + START_S
        while self.poll() is None and time.monotonic() < deadline_s:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.005)
        raise ProcessLookupError(self.pid)


@dataclass
class Lab:
    """Hosts that are up. ``Lab.up(3)`` makes one, ``Lab.attach(id)`` finds it again, ``down`` or the end of the owner ends it."""

    folder: Path  # keys, configuration and logs; common to all hosts
    switch: int  # process id of the first process of all
    switch_start: str  # when that one started: process ids are used again
    first_pids: dict[str, int] = field(default_factory=dict)  # host -> its first process
    _starter: subprocess.Popen | None = field(default=None, repr=False)  # waits for the switch; where this process made the lab

    # -- life

    @staticmethod
    def up(num_hosts: int, keep: bool = False) -> Lab:
        """A new lab. It ends with the thread that called this, or with ``down``; ``keep`` leaves it until ``down``. Raises LabError."""
        lack = missing()
        if lack:
            raise LabError(f"no lab on this machine; it lacks {lack}")
        remove_stale()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            starter, switch = _start_first(NEW_SWITCH, folder, None if keep else _end_with_parent)
            lab = Lab(folder, switch, _start_time(switch) or "", _starter=starter)
            lab._save()
        except BaseException:
            shutil.rmtree(folder)
            raise
        try:
            lab._write_configuration()
            lab._in_switch("ip link add br0 type bridge && ip link set br0 up")
            for _ in range(num_hosts):
                lab.add_host()
        except BaseException:
            lab.down()
            raise
        return lab

    @staticmethod
    def attach(lab_id: str) -> Lab:
        """A lab that is up, by its id. Raises LabError."""
        folder = Path(tempfile.gettempdir()) / f"{PREFIX}{lab_id}"
        try:
            lab = Lab(folder, **json.loads((folder / "lab.json").read_text()))
        except OSError:
            raise LabError(f"no lab {lab_id!r}; up are: {' '.join(lab.id for lab in labs()) or 'none'}") from None
        return lab

    def down(self) -> None:
        """End every process of the lab and remove its folder. Nothing is left of it; safe to call again."""
        if self.is_up():
            os.kill(self.switch, signal.SIGKILL)
            wait_until(lambda: not self.is_up(), "the lab to end")
        if self._starter:
            self._starter.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_up(self) -> bool:
        """Whether the lab still lives."""
        return _start_time(self.switch) == self.switch_start

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    # -- hosts

    @property
    def id(self) -> str:
        """What tells this lab from others on the machine."""
        return self.folder.name.removeprefix(PREFIX)

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts: node1, node2, ..."""
        return list(self.first_pids)

    def address(self, host: str) -> str:
        """The IPv4 address of a host."""
        return f"{SUBNET}.{self._number(host)}"

    def hosts_file(self, host: str) -> Path:
        """The file that this host sees as /etc/hosts. Write to it in place; the other hosts have their own."""
        self._number(host)
        return self.folder / host / "hosts"

    def add_host(self) -> str:
        """One more host, known to all; its name."""
        name = f"node{len(self.hosts) + 1}"
        (self.folder / name).mkdir()
        # In the background, so that all the host's processes are the switch's to end and to reap.
        starter, first = _start_first([*self._enter(self.switch, "pid"), "sh", "-c", '"$@" &', "sh", *NEW_HOST], self.folder)
        starter.wait()
        self.first_pids[name] = first
        self._save()
        for host in self.hosts:
            self.hosts_file(host).write_text("127.0.0.1 localhost\n" + "".join(f"{self.address(other)} {other}\n" for other in self.hosts))
        self._in_switch(f"ip link add {name} type veth peer name {INTERFACE} netns {first} && ip link set {name} master br0 up")
        setup = HOST_SETUP.format(folder=shlex.quote(str(self.folder)), name=name, address=self.address(name))
        self.run(name, ["sh", "-ec", setup], cwd="/", check=True)
        self.start_sshd(name)
        return name

    def processes(self, host: str) -> list[int]:
        """Process ids, as this machine sees them, of all that runs on a host."""
        return sorted(_processes_of(self._first(host)))

    # -- programs

    def popen(self, host: str, argv: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | Path | None = None, **popen: Any) -> HostProcess:
        """Start a program on a host, with this process's environment and ``env``, in ``cwd`` or here; other arguments are Popen's."""
        namespaces = self._enter(self._first(host), "net", "mount", "uts", "ipc", "pid")
        here = ["env", "--chdir", str(cwd or os.getcwd()), "--"]
        return HostProcess([*namespaces, *here, *map(str, argv)], env=_environment(env or {}), **popen)

    def run(
        self,
        host: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        timeout: float | None = 60,
        check: bool = False,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end; its status, output and errors as text. After ``timeout`` seconds it is killed and
        TimeoutExpired raised. With ``check`` a status other than 0 raises LabError."""
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        with self.popen(host, argv, env, cwd, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                output, errors = process.communicate(input, timeout=timeout)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            raise LabError(f"{host}: {shlex.join(map(str, argv))} ended with {process.returncode}: {(errors or output).strip()}")
        return subprocess.CompletedProcess(list(argv), process.returncode, output, errors)

    def start_sshd(self, host: str) -> None:
        """Let a host take ssh connections, as all do at first."""
        argv = [find_program("sshd"), "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / host / "sshd.log")]
        self.run(host, argv, cwd="/", check=True)
        wait_until(self.inside(host, "/run/sshd.pid").exists, f"sshd of {host}")  # written when it listens

    def stop_sshd(self, host: str) -> None:
        """Refuse new ssh connections; those that are open stay."""
        pid_file = self.inside(host, "/run/sshd.pid")
        if pid_file.exists():
            self.run(host, ["kill", pid_file.read_text().strip()], check=True)
            wait_until(lambda: not pid_file.exists(), f"the end of sshd on {host}")

    # -- faults and differences

    def shape(self, host: str, rate: str) -> None:
        """Limit a host's link, each way, to a rate as tc writes it: ``200mbit``."""
        limit = f"root tbf rate {shlex.quote(rate)} burst 256kb latency 50ms"
        self.run(host, ["sh", "-ec", f"tc qdisc replace dev {INTERFACE} {limit}"], check=True)
        self._in_switch(f"tc qdisc replace dev {host} {limit}")

    def unshape(self, host: str) -> None:
        """Undo ``shape``."""
        self.run(host, ["tc", "qdisc", "del", "dev", INTERFACE, "root"])  # fails where there is none
        self._in_switch(f"tc qdisc del dev {host} root || true")

    def cut(self, host: str) -> None:
        """Drop all packets from and to a host, silently: to the others it looks like a host without power."""
        self._number(host)
        self._in_switch(f"bridge link set dev {host} state 0")  # disabled

    def heal(self, host: str) -> None:
        """Undo ``cut``."""
        self._number(host)
        self._in_switch(f"bridge link set dev {host} state 3")  # forwarding

    def mount_tmpfs(self, host: str, path: str | Path, size: str = "64m") -> None:
        """An empty file system of a size at ``path``, on this host only; the others go on seeing what is there."""
        self.run(host, ["mkdir", "-p", str(path)], check=True)
        self.run(host, ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)

    def bind(self, host: str, source: str | Path, target: str | Path) -> None:
        """Show the file or folder ``source`` at ``target``, which exists, on this host only."""
        self.run(host, ["mount", "--bind", str(source), str(target)], check=True)

    def unmount(self, host: str, path: str | Path) -> None:
        """Undo ``mount_tmpfs`` or ``bind``."""
        self.run(host, ["umount", str(path)], check=True)

    # -- inside

    def _number(self, host: str) -> int:
        if host not in self.first_pids:
            raise LabError(f"no host {host!r} in lab {self.id}; it has {' '.join(self.hosts)}")
        return self.hosts.index(host) + 1

    def _first(self, host: str) -> int:
        self._number(host)
        if not self.is_up():
            raise LabError(f"lab {self.id} is down")
        return self.first_pids[host]

    def inside(self, host: str, path: str) -> Path:
        """A path of a host's own mounts as seen from here."""
        return Path(f"/proc/{self._first(host)}/root{path}")

    def _enter(self, pid: int, *namespaces: str) -> list[str]:
        return ["nsenter", "--target", str(pid), *(f"--{name}" for name in namespaces), "--"]

    def _in_switch(self, script: str) -> None:
        argv = [*self._enter(self.switch, "net"), "sh", "-ec", script]
        done = subprocess.run(argv, capture_output=True, text=True, env=_environment({}), check=False)
        if done.returncode:
            raise LabError(f"switch: {script}: {done.stderr.strip()}")

    def _save(self) -> None:
        state = {"switch": self.switch, "switch_start": self.switch_start, "first_pids": self.first_pids}
        partial = self.folder / ".lab.json"
        partial.write_text(json.dumps(state))
        partial.replace(self.folder / "lab.json")

    def _write_configuration(self) -> None:
        for name in ("id", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab {self.id}", "-f", str(self.folder / name)], check=True)
        (self.folder / "known_hosts").write_text(f"* {(self.folder / 'host_key.pub').read_text()}")
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")  # no name server to wait for
        # A home of its own: no start-up file of the user's runs in a shell of the lab, and nothing is written to his home.
        others = [line for line in Path("/etc/passwd").read_text().splitlines(keepends=True) if line.split(":")[2:3] != ["0"]]
        (self.folder / "passwd").write_text("root:x:0:0:root:/run/home:/bin/bash\n" + "".join(others))
        (self.folder / "slurm").mkdir()


def labs() -> list[Lab]:
    """The labs of this user that are up, oldest first."""
    folders = sorted(_folders(), key=lambda folder: folder.stat().st_mtime)
    return [lab for lab in (Lab.attach(folder.name.removeprefix(PREFIX)) for folder in folders) if lab.is_up()]


def remove_stale() -> None:
    """Remove what labs whose owner was killed have left: their folders; the kernel has ended the rest."""
    for folder in _folders():
        try:
            lab = Lab.attach(folder.name.removeprefix(PREFIX))
        except LabError:
            continue  # somebody else has just removed it
        if not lab.is_up():
            lab.down()


def _folders() -> Iterator[Path]:
    for state in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lab.json"):
        if state.stat().st_uid == os.geteuid():
            yield state.parent


def find_program(program: str) -> str:
    """Where a program is, sbin included; empty when it is not installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}") or ""


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:{SBIN}", "HOME": "/run/home", "TMPDIR": "/run/tmp", **env}


def _start_first(new: Sequence[str], folder: Path, preexec: Callable[[], None] | None = None) -> tuple[subprocess.Popen, int]:
    """Start the first process of new namespaces; what made them, and the process id of the first process."""
    log = folder / "namespaces.log"
    with log.open("a") as errors:
        files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        starter = subprocess.Popen([*new, *FIRST], env=_environment({}), start_new_session=True, preexec_fn=preexec, **files)
    assert starter.stdout is not None
    with starter.stdout as stream:
        line = stream.readline()
    if not line:
        starter.wait()
        raise LabError(f"no namespaces: {log.read_text().strip()}")
    return starter, int(line)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _processes_of(first: int) -> Iterator[int]:
    namespace = os.readlink(f"/proc/{first}/ns/pid")
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != first and os.readlink(entry / "ns/pid") == namespace:
                yield int(entry.name)
        except OSError:
            pass  # it has ended


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Wait until a condition holds; raises LabError, saying for what it waited, when it takes longer than ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise LabError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.01)
