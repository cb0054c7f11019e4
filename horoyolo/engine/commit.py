"""Full copies of a run's state in memory: what a worker goes back to where the state that it stands in can't be used any more.

Two copies take turns, so that the older one stays whole while the newer one is written. They lie in this process, or as files in a folder that
outlives it (of /dev/shm: memory, not a disk). Loader processes hand over images in /dev/shm too and die of a bus error where it is full, so there
copies leave room; where there is little, as in a container, they are kept in the process after all.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor

from horoyolo.engine.state import Progress, TrainState
from horoyolo.files import atomic_file

log = logging.getLogger("horoyolo")

SHARE_OF_TIME = 0.01  # that copies made by ``offer`` may cost
NUM_COPIES = 2
SPARE_SHARE, SPARE_BYTES = 0.25, 2**30  # what stays free beside copies in a folder: so much of it, and no more than so many bytes


class Job(Protocol):
    """The part of ``build.Training`` that is copied."""

    @property
    def state(self) -> TrainState: ...
    @property
    def progress(self) -> Progress: ...
    def rank_state(self) -> dict[str, Any]: ...
    def load_rank_state(self, state: dict[str, Any]) -> None: ...


class Commits:
    """The last two states of a run, each with the number of its update. None that was torn or could not be written whole is ever given back."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder`` is this worker's alone: what is half written there was left by one that was killed."""
        self._folder = folder
        for left_over in folder.glob(".commit-*.tmp") if folder is not None else ():
            left_over.unlink(missing_ok=True)
        self._copies: list[tuple[int, dict[str, Any]]] = []  # oldest first; unused with a folder
        self._due_s = 0.0

    def offer(self, job: Job) -> None:
        """Copies the state of this worker where it is time to; call it between an update and the next backward.

        It is time when the copies so far cost less than a hundredth of the run. A state after an update that was left out, or with a value that
        is not finite, is nothing to go back to and is not copied.
        """
        started_s = time.perf_counter()
        if started_s < self._due_s or job.progress.skipped_updates:
            return
        state = local_state(job)
        bad = first_bad(state)
        if bad:
            log.warning("update %d: %s is not finite, the state is not kept", job.progress.update, bad)
        else:
            self.save(state, job.progress.update)
        done_s = time.perf_counter()
        self._due_s = done_s + (done_s - started_s) / SHARE_OF_TIME

    def save(self, state: dict[str, Any], update: int) -> None:
        """Keeps a copy of ``state`` in place of the older of two. A folder that is full costs the copy, not the run."""
        if self._folder is not None and not self._has_room(state):
            log.warning("%s: too little room for copies of the state; a worker that takes this one's place will have none", self._folder)
            for path in self._files():
                path.unlink(missing_ok=True)
            self._folder = None
        if self._folder is not None:
            self._write(state, update)
            return
        # While it is written it is in no list: who is interrupted here leaves the other copy.
        spare = self._copies.pop(0)[1] if len(self._copies) == NUM_COPIES else None
        self._copies.append((update, copied(state, spare)))

    def latest(self, below: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """(update, state) as it was last saved, or last before update ``below``; None where nothing was. The caller may keep and change it."""
        if self._folder is None:
            found = [(update, state) for update, state in self._copies if below is None or update < below]
            return (found[-1][0], copied(found[-1][1])) if found else None
        for path in reversed(self._files()):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
                log.error("%s: unreadable (%s); the copy before it is taken", path.name, str(error).splitlines()[0])
                continue
            if below is None or content["update"] < below:
                return content["update"], content["state"]
        return None

    def clear(self) -> None:
        """Forgets all copies; the next one offered is taken."""
        self._copies.clear()
        self._due_s = 0.0
        for path in self._files() if self._folder is not None else ():
            path.unlink(missing_ok=True)

    def _has_room(self, state: dict[str, Any]) -> bool:
        """Whether the folder takes ``state`` beside the copies that it holds, and what loaders need."""
        assert self._folder is not None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self._folder)
        except OSError:
            return True  # writing tells
        return disk.free - num_bytes(state) >= min(SPARE_SHARE * disk.total, SPARE_BYTES)

    def _write(self, state: dict[str, Any], update: int) -> None:
        assert self._folder is not None
        files = self._files()
        number = int(files[-1].stem.partition("-")[2]) + 1 if files else 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._folder / f"commit-{number:08d}.pt") as stream:
                torch.save({"update": update, "state": state}, stream)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            log.warning("copy of update %d not written: %s", update, str(error).splitlines()[0])
            return
        for outdated in files[: 1 - NUM_COPIES]:
            outdated.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        assert self._folder is not None
        return sorted(self._folder.glob("commit-*.pt"))


def local_state(job: Job) -> dict[str, Any]:
    """All of a worker's state, what it shares with the others and what is its own, as it lies: ``copied`` makes a copy of it."""
    return {"shared": job.state.state_dict(), "own": job.rank_state()}


def restore(job: Job, state: dict[str, Any]) -> None:
    """Puts a worker back where ``local_state`` was taken."""
    job.state.load_state_dict(state["shared"])
    job.load_rank_state(state["own"])


def copied(tree: Any, spare: Any = None) -> Any:
    """A copy of nested dictionaries, lists and tensors that shares nothing with ``tree``, on the CPU, in the memory of ``spare`` where that fits."""
    if isinstance(tree, Tensor):
        if isinstance(spare, Tensor) and (spare.shape, spare.dtype, spare.stride()) == (tree.shape, tree.dtype, tree.stride()):
            return spare.copy_(tree.detach())
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        spares = spare if isinstance(spare, dict) else {}
        return {name: copied(value, spares.get(name)) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = spare if isinstance(spare, (list, tuple)) and len(spare) == len(tree) else [None] * len(tree)
        return type(tree)(copied(value, old) for value, old in zip(tree, values, strict=True))
    return copy.deepcopy(tree)


def num_bytes(tree: Any) -> int:
    """What the tensors in nested dictionaries, lists and tuples take."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(num_bytes, parts))


def first_bad(tree: Any, name: str = "") -> str:
    """The name of the first floating-point tensor in ``tree`` with a value that is not finite, empty where there is none."""
    if isinstance(tree, Tensor):
        # A sum is not finite where a value is not; it is ten times as quick as looking at each.
        return name if tree.is_floating_point() and not bool(tree.sum().isfinite()) and not bool(tree.isfinite().all()) else ""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = dict(enumerate(tree)).items()
    else:
        return ""
    return next((bad for key, value in items if (bad := first_bad(value, f"{name}.{key}" if name else str(key)))), "")
