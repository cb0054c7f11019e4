"""Checkpoints that cannot be torn, and the newest good one of a run.

A checkpoint is a file of plain types and tensors in ``checkpoints/``, written beside its final name, read back and renamed. ``manifest.json`` holds
its size and SHA-256, so that a file that was cut or changed later is found before it is used: torch itself loads tensors with flipped bits. It is
free of the number of workers; beside it each worker writes what only it knows, which serves at the same number of workers alone.

The newest is the one that was written last, not the one of the highest step: a run may go back, and what it wrote before then is of another course.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

from horoyolo.config import InputError
from horoyolo.files import atomic_file, sync_folder

log = logging.getLogger("horoyolo")

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
FILES = "step-" + "[0-9]" * 8 + ".pt"

Manifest = dict[str, dict[str, Any]]  # by file name, in the order of writing; an empty entry: nothing is known of the file


class Unread(InputError):
    """A checkpoint that can't be read now; whether it is good nobody knows."""


def serialised(state: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint of ``state``: a copy, which training may go on from."""
    import torch  # here and below: a launcher looks for runs on machines that have none

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_checkpoint(folder: Path, content: memoryview, step: int, keep: int, notes: dict[str, Any]) -> Path:
    """Writes ``content`` as ``folder/step-N.pt``, then its manifest entry with ``notes``, then deletes outdated checkpoints.

    The ``keep`` that were written last stay, and the last whose notes say ``best``. Raises OSError where the disk is full or gives back other bytes
    than it was given; all that was there before is then still there.
    """
    path = folder / f"step-{step:08d}.pt"
    for outdated in _put(path, content, MANIFEST, FILES, keep, {"step": step, **notes}):
        for own in folder.glob(f"{Path(outdated).stem}.rank-*.pt"):  # also of workers that are no more
            own.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at ``path`` (InputError: can't be read, torn, changed since it was written)."""
    import torch

    content = _good_content(path, _read_manifest(path.parent) or {})
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise InputError(f"checkpoint {path}: does not load ({str(error).splitlines()[0]}); take an earlier one") from None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint in ``folder``; bad ones that are newer are set aside, under a name with ``.bad``, with a line in the log.

    One that the disk does not give is left where it is. None for a folder without any. Raises InputError where there are some and none is good.
    """
    bad: dict[Path, InputError] = {}
    newest = next(_good_checkpoints(folder, bad), None)
    for path, error in bad.items():
        log.error("%s", error)
        where = f"going on from {newest.name}" if newest else "there is no other"
        if isinstance(error, Unread):
            log.error("CHECKPOINT %s CAN'T BE READ and is left alone; %s", path.name, where)
            continue
        if path.exists():
            path.replace(path.with_name(f"{path.name}.bad"))
            sync_folder(folder)
        log.error("CHECKPOINT %s IS BAD or gone, and is set aside as %s.bad; %s", path.name, path.name, where)
    unread = next((error for error in bad.values() if isinstance(error, Unread)), None)
    if newest is None and unread is not None:
        raise unread
    if newest is None and any(folder.glob(f"{FILES}.bad")):
        raise InputError(f"{folder}: no checkpoint in it is good; to start anew, delete what ends in .bad or choose another --name")
    return newest


def write_rank_state(folder: Path, content: memoryview, step: int, rank: int, size: int, keep: int, notes: dict[str, Any]) -> None:
    """Writes what only worker ``rank`` of ``size`` knows beside the checkpoint of ``step``, on its own disk.

    It stays as long as the checkpoint: the rule is that of ``write_checkpoint``, by a manifest of this rank's own.
    """
    path = folder / _rank_file(step, rank, size)
    _put(path, b"".join((hashlib.sha256(content).digest(), content)), f"manifest.rank-{rank}.json", f"step-*.rank-{rank}-of-*.pt", keep, notes)


def read_rank_state(folder: Path, step: int, rank: int, size: int) -> dict[str, Any] | None:
    """What ``write_rank_state`` wrote; None where there is nothing good: another number of workers, another host, a spoilt file."""
    import torch

    path = folder / _rank_file(step, rank, size)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.error("%s: can't be read (%s); this worker goes on without it", path, error.strerror)
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
    bad: dict[Path, InputError] = {}
    newest = next(_good_checkpoints(run / "checkpoints", bad), None)
    if newest is None:
        why = "; ".join(map(str, bad.values())) or f"there is none in {run / 'checkpoints'}"
        raise InputError(f"--resume {target}: no good checkpoint: {why}")
    for error in bad.values():
        log.error("%s; going on from %s", error, newest.name)
    return run, newest


def _good_checkpoints(folder: Path, bad: dict[Path, InputError]) -> Iterator[Path]:
    """Good checkpoints, newest first; those that were found to be bad on the way go to ``bad``, with what is wrong with them."""
    manifest = _read_manifest(folder) or {}
    unknown = sorted({path.name for path in folder.glob(FILES)} - manifest.keys())  # written after the manifest was
    for name in reversed([*manifest, *unknown]):
        try:
            _good_content(folder / name, manifest)
        except InputError as error:
            bad[folder / name] = error
        else:
            yield folder / name


def _good_content(path: Path, manifest: Manifest) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: there is no such file") from None
    except OSError as error:
        raise Unread(f"checkpoint {path}: can't be read ({error.strerror}); try again, or take an earlier one") from None
    known = manifest.get(path.name)
    if not known:
        # Its writer was killed before the manifest, or that was spoilt: torch keeps checksums inside, a CRC-32 of each tensor.
        if not _is_sound(content):
            raise InputError(f"checkpoint {path}: torn or changed since it was written (checksums inside differ); take an earlier one")
        return content
    if len(content) != known["bytes"] or hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise InputError(f"checkpoint {path}: torn or changed since it was written (SHA-256 differs); take an earlier one")
    return content


def _put(path: Path, content: bytes | memoryview, manifest_name: str, files: str, keep: int, notes: dict[str, Any]) -> list[str]:
    """Writes one of the ``files`` (a pattern) that a manifest lists, then its entry, then deletes those that are outdated; gives their names.

    The manifest forgets a file only when that is gone: one that it does not know counts as written after it.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in (*folder.glob(f".{files}.*.tmp"), *folder.glob(f".{manifest_name}.*.tmp")):  # by a writer that was killed
        left_over.unlink(missing_ok=True)
    there = sorted(found.name for found in folder.glob(files))
    known = _read_manifest(folder, manifest_name)
    manifest: Manifest = {name: entry for name, entry in known.items() if name in there} if known is not None else {name: {} for name in there}
    unknown = [name for name in there if name not in manifest and name != path.name]  # of writers that were killed
    if path.name in there:
        # The run comes by this step again. Should it die in between, the file under this name, old or new, is judged by the checksums inside.
        manifest[path.name] = {}
        _write_manifest(folder / manifest_name, manifest)
    sha256 = _write_checked(path, content)
    manifest.pop(path.name, None)
    manifest[path.name] = {"sha256": sha256, "bytes": len(content), **notes}
    outdated = _outdated(manifest, keep)
    _delete(folder, unknown)
    if outdated:
        _write_manifest(folder / manifest_name, manifest)
        _delete(folder, outdated)
    _write_manifest(folder / manifest_name, {name: entry for name, entry in manifest.items() if name not in outdated})
    return unknown + outdated


def _delete(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _write_checked(path: Path, content: bytes | memoryview) -> str:
    """Writes a file and reads it back before it takes its name; gives its SHA-256 (OSError: it differs)."""
    sha256 = hashlib.sha256(content).hexdigest()
    with atomic_file(path, "w+b") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from what the kernel remembers
        stream.seek(0)
        if _digest_of(stream) != sha256:
            raise OSError(f"{path.name}: the disk gives back other bytes than were written")
    return sha256


def _digest_of(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while part := stream.read(CHUNK_BYTES):
        digest.update(part)
    return digest.hexdigest()


def _outdated(manifest: Manifest, keep: int) -> list[str]:
    """All but the ``keep`` written last, the last that is known to be the best, and those after it of which nothing is known: it may be one."""
    names = list(manifest)
    best = max((index for index, name in enumerate(names) if manifest[name].get("best")), default=-1)
    return [name for index, name in enumerate(names[:-keep]) if index < best or (index > best and manifest[name])]


def _write_manifest(path: Path, manifest: Manifest) -> None:
    with atomic_file(path, "w") as stream:
        json.dump(manifest, stream, indent=1)


def _read_manifest(folder: Path, name: str = MANIFEST) -> Manifest | None:
    """What is known of each file; None where there is no manifest or it can't be read."""
    try:
        return _parse_manifest((folder / name).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.error("%s is unreadable (%s): checkpoints are judged by the checksums inside them", folder / name, error)
        return None


def _parse_manifest(text: str) -> Manifest:
    manifest = json.loads(text)
    if not isinstance(manifest, dict):
        raise ValueError("not a table of files")
    return {name: entry if _is_entry(entry) else {} for name, entry in manifest.items()}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)


def _is_sound(content: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):  # whatever a spoilt header leads to
        return False
