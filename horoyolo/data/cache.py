"""Results of a label scan on disk: one file per content, written whole or not at all, so that jobs may start side by side."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from horoyolo.files import atomic_file

FORMAT = "horoyolo label scan 4"  # change it with what a scan finds or how it is stored
LOOK_EVERY_S = 0.05

Beat = Callable[[], object]  # called again and again by what may take long: a sign of life


def nothing() -> None:
    """A beat that nobody hears."""


def folders(root: Path) -> list[Path]:
    """Where caches may lie, best first: beside the data, or, where that can't be written to, in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [root / ".horoyolo-cache", user / "horoyolo"]


@contextlib.contextmanager
def one_at_a_time(folders: list[Path], beat: Beat = nothing) -> Iterator[None]:
    """Holds a lock on the first folder that can be made, so that of jobs and workers that start together one scans and the others find its results.

    Who waits calls ``beat`` again and again. The kernel frees the lock of a process that dies. Where there are no locks, nobody waits: then
    several may scan.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                _lock(descriptor, beat)
                break
            except OSError:
                continue
        yield


def _lock(descriptor: int, beat: Beat) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            beat()
            time.sleep(LOOK_EVERY_S)


def content_key(names: list[str], images: list[Path], labels: list[Path], classes: str) -> str:
    """A hash that changes with any file's name, size or time of change, and with ``classes``, what labels depend on of the classes."""
    digest = hashlib.sha256(f"{FORMAT}\0{classes}\0".encode())
    for name, image, label in zip(names, images, labels, strict=True):
        digest.update(f"{name}\0{_stamp(image)} {_stamp(label)}\0".encode())
    return digest.hexdigest()


def _stamp(file: Path) -> str:
    try:
        status = os.stat(file)
    except OSError:
        return "-"
    return f"{status.st_size} {status.st_mtime_ns}"


def load(folders: list[Path], split: str, key: str) -> dict[str, np.ndarray] | None:
    """The arrays kept under a key, or none: a missing, torn or foreign file counts as absent."""
    for folder in folders:
        try:
            with np.load(_file(folder, split, key), allow_pickle=False) as archive:
                if archive["key"].item() == key:
                    return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    return None


def save(folders: list[Path], split: str, key: str, arrays: dict[str, np.ndarray]) -> Path | None:
    """Keep arrays in the first folder that can be written to; none of them may: then nothing is kept, and the next job scans again."""
    for folder in folders:
        file = _file(folder, split, key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as stream:
                np.savez(stream, key=np.array(key), **arrays)  # type: ignore[arg-type]
            return file
        except OSError:  # read-only, say, or full
            continue
    return None


def json_array(value: Any) -> np.ndarray:
    """A plain value as an array of bytes, for a file without pickles."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def parse_json(array: np.ndarray) -> Any:
    """The value that `json_array` stored."""
    return json.loads(array.tobytes())


def _file(folder: Path, split: str, key: str) -> Path:
    return folder / f"{split}-{key[:32]}.npz"
