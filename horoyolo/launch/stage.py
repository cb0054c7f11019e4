"""The data set to the disks of the hosts: copied once, checked there, and then used as --data by the workers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

from horoyolo.launch.environment import python_words
from horoyolo.launch.hosts import Host, bracketed
from horoyolo.launch.judge import size_text
from horoyolo.launch.remote import Ssh, is_this_machine, ssh_argv, ssh_options
from horoyolo.launch.session import SSH_FAILED, Unreachable, explain, ssh_to

MAX_COPIES = 16  # at once: more would only share this machine's link, each with a list of all files in memory
PROGRESS_S = 5.0  # between two lines of a host
RETRY_S = 60.0  # a host that joins and can't be staged to is tried again after that
LOOK_LIMIT_S = 60.0
CHECK_LIMIT_S = 1800.0  # the first scan of a large data set on a slow disk
SILENCE_S = 60  # of rsync, after which the connection counts as broken
BLOCK = 4096  # files take whole blocks
MARGIN_BYTES = 16 * 2**20  # for folders and the cache of the scan

# Looks at a host before anything is copied; $1 is the folder of copies, $2 the copy's name, $3 that of an unfinished one.
LOOK = """\
mkdir -p -- "$1" || exit 3
test -w "$1" || { echo "$1 can't be written to" >&2; exit 3; }
command -v rsync >/dev/null && echo rsync
test -d "$1/$2" && echo staged
free=$(df -Pk -- "$1" | awk 'END { print $4 }')
have=0
test -d "$1/$3" && have=$(du -sk -- "$1/$3" | cut -f1)
echo "kb $free $have"
"""
# $1 becomes $2, which another host may have made meanwhile where both see the same file system.
FINISH = 'if [ -d "$2" ]; then rm -rf -- "$1"; else mv -T -- "$1" "$2"; fi'
REOPEN = 'rm -rf -- "$2" && mv -T -- "$1" "$2"'
CHECK = 'cd "$1" 2>/dev/null; shift; exec "$@"'  # as workers do: a checkout there counts as installed
PROGRESS = re.compile(rb"\s*([\d,.]+\w?)\s+(\d+)%\s+(\S+/s)")


class DataLayout(Protocol):
    """A data set as it is laid out below one folder; horoyolo.data.staging plans one."""

    @property
    def name(self) -> str:
        """Name of that folder, different for different content."""

    @property
    def files(self) -> Sequence[tuple[str, Path]]:
        """Name below the folder, where the file is now."""

    @property
    def texts(self) -> Mapping[str, str]:
        """Name below the folder -> content of a file to be written; one is data.yaml."""

    @property
    def hash(self) -> str:
        """What ``horoyolo data check --json -`` must say of the copy."""


class StageError(Exception):
    """A host that could not be given the data; one line that says which, why, and what to do."""


class Stage:
    """Copies of one data set below a folder of the same name on every host. Safe to use from several threads.

    A copy lies at ``directory/name`` only when it is whole and its content has been checked; until then it is collected in a hidden folder
    beside it, which a later attempt goes on from.
    """

    def __init__(self, layout: DataLayout, directory: str | Path, ssh: Ssh | None = None, say: Callable[[str], None] | None = None) -> None:
        self._layout = layout
        self._directory = os.path.abspath(os.path.expanduser(directory))
        self._ssh = ssh or Ssh()
        self._say = say or _say_to_user
        self._lock = threading.Lock()
        self._ready: set[str] = set()
        self._tried_s: dict[str, float] = {}  # host -> when copying to it was last started in the background
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        self._source_lock = threading.Lock()
        self._source_folder = ""

    @property
    def data(self) -> str:
        """What workers are to use as --data."""
        return f"{self._folder}/data.yaml"

    def is_ready(self, host: Host) -> bool:
        """Whether a host is known to have a checked copy. Asks nobody."""
        return host.name in self._ready

    def stage_all(self, hosts: Sequence[Host]) -> list[str]:
        """Give every host a copy, many at once; the hosts' problems, one line each with host and remedy. When interrupted, ends all copying."""
        if shutil.which("rsync") is None:
            return ["this machine has no rsync, which copies the data: apt install rsync"]
        with ThreadPoolExecutor(MAX_COPIES) as pool:
            try:
                return [problem for problem in pool.map(self._problem, hosts) if problem]
            except BaseException:
                self.stop()
                raise

    def ready_hosts(self, hosts: Sequence[Host]) -> list[Host]:
        """Those of some hosts that have a checked copy; copying to the others goes on in the background, so that they come later.

        For a discovery of hosts, which may be asked every second: it returns at once.
        """
        for host in hosts:
            with self._lock:
                busy = time.monotonic() - self._tried_s.get(host.name, -RETRY_S) < RETRY_S or self._stopped
                if host.name in self._ready or busy:
                    continue
                self._tried_s[host.name] = float("inf")  # until it has ended
            threading.Thread(target=self._stage_later, args=(host,), daemon=True).start()
        return [host for host in hosts if self.is_ready(host)]

    def stop(self) -> None:
        """End all copying; what has been copied is kept for the next time."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()

    def stage_host(self, host: Host) -> None:
        """Give one host a copy unless it has one; either is checked by the hash of its content. Raises StageError."""
        if self.is_ready(host):
            return
        look = self._look(host)
        staged = "staged" in look
        if staged:
            if self._is_right(host, self._folder):
                self._say(f"stage: {host.name}: {self._folder} is there already")
                self._ready.add(host.name)
                return
            self._say(f"stage: {host.name}: {self._folder} is there, but not as it should be: repairing it")
            self._move(host, REOPEN, self._folder, self._partial(host))
        self._check_room(host, look)
        self._copy(host, look_closely=staged)
        if not self._is_right(host, self._partial(host)):
            self._copy(host, look_closely=True)  # remains of an earlier attempt may have passed for the right files
            if not self._is_right(host, self._partial(host)):
                where = self._partial(host)
                raise StageError(f"{host.name}: the copy in {where} is not what was sent; check its disk and memory, remove {where} and try again")
        self._move(host, FINISH, self._partial(host), self._folder)
        self._say(f"stage: {host.name}: {self._folder} is there and checked")
        self._ready.add(host.name)

    # Steps

    @property
    def _folder(self) -> str:
        return f"{self._directory}/{self._layout.name}"

    def _partial(self, host: Host) -> str:
        # Of this host alone: where the folder is on a file system that hosts share, they don't get into each other's way.
        return f"{self._directory}/.{self._layout.name}.{host.name}.partial"

    def _problem(self, host: Host) -> str:
        try:
            self.stage_host(host)
        except StageError as error:
            return str(error)
        return ""

    def _stage_later(self, host: Host) -> None:
        problem = self._problem(host)
        if problem:
            self._say(f"stage: {problem}; {host.name} gets no workers until that works")
        with self._lock:
            self._tried_s[host.name] = time.monotonic()

    def _look(self, host: Host) -> dict[str, list[int]]:
        """What there is on a host: rsync, a staged copy, free and used room in kB."""
        status, output, complaint = self._run(
            host, ["sh", "-c", LOOK, "sh", self._directory, self._layout.name, Path(self._partial(host)).name], LOOK_LIMIT_S
        )
        if status:
            raise StageError(f"{host.name}: {self._directory} can't be used: {_last(complaint)}; give --stage a folder that can be written to there")
        found = {
            words[0]: [int(word) for word in words[1:]]
            for line in output.splitlines()
            if (words := line.split()) and words[0] in ("rsync", "staged", "kb")
        }
        if "rsync" not in found:
            raise StageError(f"{host.name}: there is no rsync on it, which receives the data: apt install rsync")
        return found

    def _check_room(self, host: Host, look: Mapping[str, list[int]]) -> None:
        free, have = (1024 * kb for kb in look["kb"])
        if "staged" in look:
            return  # it is only repaired
        try:
            sizes = [os.path.getsize(path) for _, path in self._layout.files] + [len(text) for text in self._layout.texts.values()]
        except OSError as error:
            raise StageError(f"{error.filename} can't be read on this machine: {error.strerror}; see to it and start again") from None
        wanted = sum(-(-size // BLOCK) * BLOCK for size in sizes) + MARGIN_BYTES - have
        if free < wanted:
            raise StageError(
                f"{host.name}: {self._directory} has {size_text(free)} free, the data set needs {size_text(wanted)} more: make room there, "
                "or give --stage another folder"
            )

    def _copy(self, host: Host, look_closely: bool) -> None:
        """Bring the unfinished copy up to date; what is there already is not sent again."""
        target = self._partial(host) + "/"
        remote: list[str] = []
        if not is_this_machine(host.name):
            remote = ["-s", "-e", shlex.join(["ssh", *ssh_options(ssh_to(host, self._ssh))])]
            target = f"{bracketed(host.name)}:{target}"
        checksum = ["--checksum"] if look_closely else []
        options = ["-rLt", "--partial", "--info=progress2", "--no-inc-recursive", f"--timeout={SILENCE_S}", *checksum]
        argv = ["rsync", *options, *remote, "--", f"{self._source()}/", target]
        with tempfile.TemporaryFile() as errors, self._started(argv, errors) as process:
            for line in self._said_at_times(host, process):
                self._say(line)
            status = process.wait()
            errors.seek(0)
            complaint = errors.read().decode("utf-8", "replace")
        if status == SSH_FAILED:
            raise _as_stage_error(host, explain(host, status, complaint))
        if status:
            # rsync's own last line only sums up; the first one says what happened.
            first = next((line.strip() for line in complaint.splitlines() if line.strip()), f"rsync ended with status {status}")
            raise StageError(f"{host.name}: copying stopped: {first}; start again, what is there is kept")

    def _source(self) -> str:
        """A folder here that looks like the copy: links to the files, which rsync follows. Made once, gone with this object."""
        with self._source_lock:
            if not self._source_folder:
                folder = tempfile.mkdtemp(prefix="horoyolo-stage-")
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                for name, path in self._layout.files:
                    link = Path(folder, name)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path)
                for name, text in self._layout.texts.items():
                    Path(folder, name).write_text(text, encoding="utf-8")
                    os.utime(Path(folder, name), (0, 0))  # the same file each time, not one that has changed
                self._source_folder = folder
            return self._source_folder

    def _said_at_times(self, host: Host, process: subprocess.Popen) -> Iterator[str]:
        """Lines for the user from rsync's, which come many times a second."""
        said_s = time.monotonic()
        rest = b""
        while part := process.stdout.read1(2**12):  # type: ignore[union-attr]
            *lines, rest = re.split(rb"[\r\n]", rest + part)
            found = [match for line in lines if (match := PROGRESS.match(line))]
            if found and time.monotonic() - said_s >= PROGRESS_S:
                said_s = time.monotonic()
                sent, percent, rate = (word.decode() for word in found[-1].groups())
                yield f"stage: {host.name}: {percent}% ({sent} bytes, {rate})"

    def _is_right(self, host: Host, folder: str) -> bool:
        """Whether a folder on a host holds the data set: its content is scanned there and the hash compared."""
        command = [sys.executable, "-m", "horoyolo", "data", "check", "--data", f"{folder}/data.yaml", "--json", "-"]
        status, output, complaint = self._run(host, ["env", *python_words(os.environ), "sh", "-c", CHECK, "sh", os.getcwd(), *command], CHECK_LIMIT_S)
        if status == 0:
            with contextlib.suppress(ValueError, KeyError, IndexError):
                return json.loads(output.splitlines()[-1])["hash"] == self._layout.hash
        if status == 2:  # the scan itself found fault with it
            return False
        raise StageError(f"{host.name}: the copy can't be checked: {_last(complaint)}; see what `horoyolo doctor` says of {host.name}")

    def _move(self, host: Host, script: str, source: str, target: str) -> None:
        status, _, complaint = self._run(host, ["sh", "-c", script, "sh", source, target], LOOK_LIMIT_S)
        if status:
            raise StageError(f"{host.name}: {source} can't be moved to {target}: {_last(complaint)}; see to the rights of {self._directory}")

    def _run(self, host: Host, command: Sequence[str], limit_s: float) -> tuple[int, str, str]:
        """Exit status, output and complaint of a command on a host; raises StageError when it can't be reached."""
        argv = list(command) if is_this_machine(host.name) else ssh_argv(host.name, command, ssh_to(host, self._ssh))
        with self._started(argv) as process:
            try:
                output, complaint = (text.decode("utf-8", "replace") for text in process.communicate(timeout=limit_s))
            except subprocess.TimeoutExpired:
                raise StageError(f"{host.name}: no answer within {limit_s:.0f} s; see what `horoyolo doctor` says of it") from None
        if process.returncode == SSH_FAILED and not is_this_machine(host.name):
            raise _as_stage_error(host, explain(host, process.returncode, complaint))
        return process.returncode, output, complaint

    @contextlib.contextmanager
    def _started(self, argv: Sequence[str], stderr: IO[bytes] | int = subprocess.PIPE) -> Iterator[subprocess.Popen]:
        """A process that ends with the block, and with `stop`."""
        with self._lock:
            if self._stopped:
                raise StageError("copying was stopped")
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
            self._running.add(process)
        try:
            with process:
                try:
                    yield process
                finally:
                    process.terminate()
        finally:
            with self._lock:
                self._running.discard(process)


def _as_stage_error(host: Host, failure: Unreachable) -> StageError:
    return StageError(f"{host.name}: {failure.message}; {failure.remedy}")


def _say_to_user(line: str) -> None:
    sys.stderr.write(line + "\n")  # at once: hosts are served by threads, and print() would let another's line in before the end of this one
    sys.stderr.flush()


def _last(complaint: str) -> str:
    """The last line of a complaint."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    return lines[-1].removeprefix("horoyolo: error: ") if lines else "no reason given"
