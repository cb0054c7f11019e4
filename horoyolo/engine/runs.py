"""The folder of a run: its name, what it goes on from, and what it holds."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horoyolo import config as configuration
from horoyolo.config import Config, InputError
from horoyolo.engine.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint
from horoyolo.engine.stop import STOP
from horoyolo.files import atomic_file

log = logging.getLogger("horoyolo")


@dataclass(frozen=True)
class Run:
    """Where a run writes, and the state it goes on from (None: from the start)."""

    folder: Path
    resumed: dict[str, Any] | None = None

    @property
    def weights(self) -> Path:
        """The folder of last.pt and best.pt."""
        return self.folder / "weights"

    @property
    def checkpoints(self) -> Path:
        """The folder that ``checkpoint.py`` writes in."""
        return self.folder / "checkpoints"

    @property
    def plots(self) -> Path:
        """The folder of pictures."""
        return self.folder / "plots"

    @property
    def logs(self) -> Path:
        """The folder of a log for each rank."""
        return self.folder / "logs"

    def create(self, config: Config) -> None:
        """Makes the folders and saves the resolved configuration, whose time says when; what is there already takes no space (OSError)."""
        for folder in self._folders():
            folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "config.yaml", configuration.dump(config)
        if not path.is_file() or path.read_text() != text:
            with atomic_file(path, "w") as stream:
                stream.write(text)
        path.touch()

    def give_up(self) -> None:
        """Removes the folders where nothing is in them: of a run that could not begin."""
        for folder in (*self._folders(), self.folder):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _folders(self) -> tuple[Path, ...]:
        return self.weights, self.checkpoints, self.plots, self.logs

    def clear(self, anew: bool) -> None:
        """Removes what the run left when it last ended: a request to stop, and files half written. Only for whoever begins it: nobody else writes.

        ``anew``: it goes on from no checkpoint. Those of a run that was here before (``--exist-ok``) are set aside, or a resume would take them for
        this one's.
        """
        (self.folder / STOP).unlink(missing_ok=True)
        for left_over in self.folder.rglob(".*.tmp"):
            if left_over.is_file():
                left_over.unlink(missing_ok=True)
        if anew and any(self.checkpoints.iterdir()):
            before = self.folder / "checkpoints-before"
            shutil.rmtree(before, ignore_errors=True)
            self.checkpoints.rename(before)
            self.checkpoints.mkdir()
            log.warning("%s: another run's checkpoints are there; they are set aside as %s", self.folder, before.name)


def resumed_folder(config: Config) -> Path | None:
    """The run folder that ``--resume`` names, None for a new run. Reads no checkpoint (InputError: nothing there)."""
    if config.resume == "auto":
        folder = Path(config.project) / config.name
        return folder if (folder / "config.yaml").is_file() else None
    if config.resume == "newest":  # a bare --resume: the newest run of the project, as in YOLOv5
        runs = sorted(Path(config.project).glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise InputError(f"--resume: no run in {config.project}; name a run folder or a checkpoint")
        return runs[-1].parent
    if config.resume:
        return find_checkpoint(Path(config.resume))[0]
    return None


def open_run(config: Config) -> Run:
    """The run that ``config`` means: a resumed one with its state, or a new one under a name that is not taken.

    Writes nothing but the folder of a new one; a bad checkpoint is set aside under another name.
    """
    folder = resumed_folder(config)
    if folder is None:
        return Run(new_folder(Path(config.project), config.name, config.exist_ok or config.resume == "auto"))
    if config.resume in ("auto", "newest"):
        run = reopen_run(folder)
        if run.resumed is None and config.resume == "newest":
            raise InputError(f"--resume: no good checkpoint in {folder / 'checkpoints'}")
        return run
    return Run(folder, read_checkpoint(find_checkpoint(Path(config.resume))[1]))


def reopen_run(folder: Path) -> Run:
    """The run in ``folder`` with the state of its newest good checkpoint, without one where it has none. Bad ones are set aside."""
    newest = newest_checkpoint(folder / "checkpoints")
    return Run(folder, read_checkpoint(newest) if newest else None)


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The state of a run's newest good checkpoint, as this host sees its folder; None without one. Changes nothing there."""
    try:
        return read_checkpoint(find_checkpoint(folder)[1])
    except InputError:
        return None


def new_folder(project: Path, name: str, exist_ok: bool) -> Path:
    """``project/name``, or with a number behind it (``exp2``, ``exp3``) where that is taken and ``exist_ok`` is not set.

    It is made at once, so that of runs that start together each has its own. Where it can't be, whoever makes what is in it will say so.
    """
    folder = project / name
    number = 2
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)  # FileExistsError here is of a link that leads nowhere, not of a name that is taken
        while not exist_ok:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                folder = project / f"{name}{number}"
                number += 1
    return folder
