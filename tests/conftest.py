"""What all tests share."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from horoyolo.launch.command import LAUNCHERS, Job
from horoyolo.launch.hosts import local_hosts


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, public weights and reference outputs, which lies beside the checkout or where HOROYOLO_SHARED says."""
    folder = Path(os.environ.get("HOROYOLO_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference outputs and real images are not there ({folder}); HOROYOLO_SHARED names their folder")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _take_interrupts() -> None:
    """A shell starts what it puts in the background deaf to SIGINT, and so would be every program that a test starts and then interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_name_server() -> Iterator[None]:
    """Names that a test makes up are known to nobody, and no name server is asked for them."""
    look_up, own = socket.getaddrinfo, {None, "", "localhost", socket.gethostname()}

    def look_up_here(host: Any, *more: Any, **options: Any) -> Any:
        if host not in own and not re.fullmatch(r"[0-9.]+|.*:.*", host.decode() if isinstance(host, bytes) else host):
            raise socket.gaierror(socket.EAI_NONAME, "no name server is asked by tests")
        return look_up(host, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up_here)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums in a fixed order, and no test that starts several processes floods the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def file_limit() -> Callable[[int], AbstractContextManager[None]]:
    """``with file_limit(n):`` no file of this process can grow beyond n bytes, as on a disk that is full."""

    @contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

    return limited


@pytest.fixture
def in_terminal() -> Iterator[Callable[..., tuple[subprocess.Popen, Callable[[], None]]]]:
    """``process, hang_up = in_terminal(argv)``: a program as the first of a session with a terminal. ``hang_up()`` takes that away as when a log-in
    breaks off: the system sends SIGHUP, and every write to the terminal fails from then on. The program is killed after the test."""
    started: list[subprocess.Popen] = []

    def start(argv: list[str], env: dict[str, str] | None = None) -> tuple[subprocess.Popen, Callable[[], None]]:
        master, slave = pty.openpty()
        reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # with it goes the terminal
        process = subprocess.Popen(["setsid", "--ctty", *argv], stdin=slave, stdout=slave, stderr=slave, env=env)
        os.close(master)
        os.close(slave)
        started.extend([process, reader])

        def hang_up() -> None:
            reader.kill()
            reader.wait()

        return process, hang_up

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """``run_workers(program, n)`` runs a Python file on n real Horovod workers: what each saved as ``rankN.pt`` in the folder it was told."""
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")

    def run(program: Path, num_workers: int, launcher: str = "horovodrun", timeout_s: float = 90) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp(f"workers-{num_workers}")
        env = {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        job = Job(num_workers, (sys.executable, str(program), str(out)), env=env, as_root=os.geteuid() == 0)
        argv = LAUNCHERS[launcher](job, local_hosts(num_workers))
        log = out / "log.txt"
        with log.open("w") as stream:
            process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=stream, stderr=stream, start_new_session=True)
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                status = -1
        assert status == 0, f"{' '.join(argv)} ended with {status}:\n{log.read_text()}"
        return [torch.load(out / f"rank{rank}.pt") for rank in range(num_workers)]

    return run
