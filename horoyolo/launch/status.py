"""How the workers of a job tell the launcher who they are and how they ended.

horovodrun turns every failure into exit status 1, and ends workers five seconds after a signal whatever they are doing. So workers leave
notes in a folder that the launcher names in the environment: that one takes signals (written once they can be handled), and the exit
status. Notes carry the host's name, since the folder may be one that several hosts see.

A batch script asks for the status of its job with ``python -m horoyolo.launch.status FOLDER STATUS_OF_LAUNCHER``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

STATUS_DIR = "HOROYOLO_STATUS_DIR"
TOO_FEW = "HOROYOLO_TOO_FEW"  # names a file that an elastic job leaves when it stops by itself, for want of workers
PRECEDENCE = (2, 1, 75, 0)  # bad input explains the failures that follow from it


def announce_worker() -> None:
    """Ask the launcher for signals: call it when handlers for SIGINT and SIGTERM are in place. Nothing happens without a launcher."""
    _note("worker", "")


def report_status(status: int) -> int:
    """Leave the exit status for the launcher and give the one to exit with.

    That is ``status`` itself, but 0 for a worker that stopped on request (75) under a launcher: horovodrun would kill the others, which may
    still be at their own last steps.
    """
    noted = _note("status", str(status))
    return 0 if status == 75 and noted else status


def note_too_few() -> None:
    """Tell a batch script, where there is one, that a job stopped because too few workers were left: a new allocation may have more."""
    if os.environ.get(TOO_FEW):
        with contextlib.suppress(OSError):  # it stays stopped, with its checkpoint
            Path(os.environ[TOO_FEW]).touch()


def make_folder(folder: Path) -> None:
    """The folder of a job on this host, which an agent shares with those of other hosts where they see the same files, and an earlier one left.

    A note says that there is an agent of this host, so that the folder stays as long as anybody needs it (``remove_notes``). Raises OSError when
    the folder is somebody else's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)  # TMPDIR may be there on the launcher's host alone
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if folder.lstat().st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user") from None
    (folder / f"agent.{_host()}.{os.getpid()}").touch()


def remove_notes(folder: Path) -> None:
    """Remove the notes of this host, and the folder unless there are other hosts' in it."""
    with contextlib.suppress(OSError):  # such as that it is not empty
        for path in folder.iterdir():
            if path.name.lstrip(".").partition(".")[2].rpartition(".")[0] == _host():
                path.unlink(missing_ok=True)
        folder.rmdir()


def announced_workers(folder: Path) -> list[int]:
    """Process ids of the workers of this host that asked for signals."""
    return sorted(int(path.suffix[1:]) for path in folder.glob(f"worker.{_host()}.*"))


def reported_statuses(folder: Path) -> dict[str, int]:
    """The status that each worker left, by the name of its note; those of other hosts too where they see this folder."""
    statuses = {}
    for path in folder.glob("status.*"):
        with contextlib.suppress(OSError):  # the agent of another host has just removed its own
            statuses[path.name] = int(path.read_text())
    return statuses


def take_status(folder: Path, pid: int) -> int | None:
    """The status that a worker of this host left, which is gone then, since another may get its number; None without one."""
    note = folder / f"status.{_host()}.{pid}"
    try:
        status = int(note.read_text())
    except FileNotFoundError:
        return None
    note.unlink()
    return status


def job_status(statuses: Iterable[int]) -> int:
    """One exit status from those of the workers and their launcher: 2 before 1 before 75 before 0; any other (a death by signal) is 1."""
    return min((status if status in PRECEDENCE else 1 for status in statuses), key=PRECEDENCE.index)


def _note(kind: str, text: str) -> bool:
    """Whether there is a launcher that reads the note."""
    folder = os.environ.get(STATUS_DIR)
    if not folder:
        return False
    path = Path(folder) / f"{kind}.{_host()}.{os.getpid()}"
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_text(text)
        partial.replace(path)  # the launcher may be reading
    except OSError:  # the launcher is gone, and its folder with it; or no more files go there
        return False
    return True


def _host() -> str:
    return os.uname().nodename


if __name__ == "__main__":
    print(job_status([*reported_statuses(Path(sys.argv[1])).values(), int(sys.argv[2])]))
