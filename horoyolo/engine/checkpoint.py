"""Checkpoints that cannot be torn, and the newest good one of a run.

A checkpoint is a file of plain types and tensors in ``checkpoints/``, written beside its final name and renamed. ``manifest.json`` holds its size
and SHA-256, so that a file that was cut or changed later is found before it is used: torch itself loads tensors with flipped bits. It is free of the
number of workers; beside it each worker writes what only it knows, which serves at the same number of workers alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

from horoyolo.config import InputError
from horoyolo.files import atomic_file

log = logging.getLogger("horoyolo")

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, state: dict[str, Any], step: int, keep: int, notes: dict[str, Any]) -> Path:
    """Writes ``state`` as ``folder/step-N.pt``, then its manifest entry with ``notes``, then deletes all but the ``keep`` newest."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with atomic_file(path) as stream:
        stream.write(content)

    manifest = _read_manifest(folder)
    manifest[path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "step": step, **notes}
    outdated = sorted(manifest)[:-keep]
    for name in outdated:
        del manifest[name]
    with atomic_file(folder / MANIFEST, "w") as stream:
        json.dump(manifest, stream, indent=1)
    for name in outdated:
        (folder / name).unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at ``path`` (InputError: not there, torn, changed since it was written)."""
    import torch  # here and above: a launcher looks for runs on machines that have none

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"checkpoint {path}: {error.strerror}") from None
    known = _read_manifest(path.parent).get(path.name)
    if known is None:
        raise InputError(f"checkpoint {path}: no entry in {MANIFEST} beside it; only checkpoints that a run finished writing are used")
    if len(content) != known["bytes"] or hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise InputError(f"checkpoint {path}: torn or changed since it was written (SHA-256 differs); take an earlier one")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in ``folder`` that reads well, with its state; bad ones are named in the log. None for a folder without any.

    Raises InputError where there are checkpoints and none is good.
    """
    problems: list[InputError] = []
    for name in sorted(_read_manifest(folder), reverse=True):
        try:
            state = read_checkpoint(folder / name)
        except InputError as error:
            problems.append(error)
            continue
        for problem in problems:
            log.error("%s; going on from %s", problem, name)
        return folder / name, state
    if problems:
        raise problems[0]
    return None


def save_rank_state(folder: Path, state: dict[str, Any], step: int, rank: int, size: int, keep: int) -> None:
    """Writes what only worker ``rank`` of ``size`` knows beside the checkpoint of ``step``, on its own disk; deletes all but its ``keep`` newest."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    with atomic_file(folder / _rank_file(step, rank, size)) as stream:
        stream.write(hashlib.sha256(content).digest() + content)
    for outdated in sorted(folder.glob(f"step-*.rank-{rank}-of-*.pt"))[:-keep]:
        outdated.unlink(missing_ok=True)


def read_rank_state(folder: Path, step: int, rank: int, size: int) -> dict[str, Any] | None:
    """What ``save_rank_state`` wrote; None where there is nothing good: another number of workers, another host, a spoilt file."""
    import torch

    path = folder / _rank_file(step, rank, size)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        log.error("%s: torn or changed since it was written (SHA-256 differs); this worker goes on without it", path)
        return None
    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)


def _rank_file(step: int, rank: int, size: int) -> str:
    return f"step-{step:08d}.rank-{rank}-of-{size}.pt"


def find_checkpoint(target: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that ``--resume target`` means: a run folder, a checkpoint, or one of its ``weights/*.pt``.

    Raises InputError where there is nothing to resume.
    """
    if target.is_dir():
        run = target
    elif target.parent.name == "checkpoints" and target.is_file():
        return target.parent.parent, target
    elif target.parent.name == "weights" and target.is_file():
        run = target.parent.parent
    else:
        raise InputError(f"--resume {target}: no run folder or checkpoint there")
    found = newest_checkpoint(run / "checkpoints")
    if found is None:
        raise InputError(f"--resume {target}: no good checkpoint in {run / 'checkpoints'}")
    return run, found[0]


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST}: unreadable ({error})") from None
