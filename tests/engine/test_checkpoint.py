"""Checkpoints cannot be torn, and a spoilt one is found."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from horoyolo.config import InputError
from horoyolo.engine import checkpoint
from horoyolo.engine.checkpoint import (
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_rank_state,
    serialised,
    write_checkpoint,
    write_rank_state,
)

Limit = Callable[[int], AbstractContextManager[None]]


def save(folder: Path, step: int, keep: int = 2, **notes: object) -> Path:
    return write_checkpoint(folder, serialised({"value": torch.full((1000,), float(step)), "step": step}), step, keep, notes={"epoch": 0, **notes})


def newest_step(folder: Path) -> int | None:
    path = newest_checkpoint(folder)
    return None if path is None else read_checkpoint(path)["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    state = read_checkpoint(path)
    assert state["step"] == 7
    assert torch.equal(state["value"], torch.full((1000,), 7.0))


def test_training_may_go_on_from_what_was_serialised(tmp_path: Path) -> None:
    value = torch.zeros(1000)
    content = serialised({"value": value})
    value.fill_(1)
    assert read_checkpoint(write_checkpoint(tmp_path, content, 1, 1, {}))["value"].sum() == 0


def test_the_last_written_are_kept_and_the_best(tmp_path: Path) -> None:
    for step, best in ((1, True), (2, True), (30, False), (4, False), (31, False)):
        save(tmp_path, step, best=best)
        assert newest_step(tmp_path) == step
    assert names(tmp_path) == ["manifest.json", "step-00000002.pt", "step-00000004.pt", "step-00000031.pt"]
    save(tmp_path, 32, best=True)
    assert names(tmp_path) == ["manifest.json", "step-00000031.pt", "step-00000032.pt"]


def test_a_run_that_went_back_goes_on_from_what_it_wrote_since(tmp_path: Path) -> None:
    for step in (70, 80):
        save(tmp_path, step)
    save(tmp_path, 60)
    assert newest_step(tmp_path) == 60
    assert find_checkpoint_step(tmp_path) == 60
    assert save(tmp_path, 70).exists()  # the same step on another course
    assert newest_step(tmp_path) == 70
    assert names(tmp_path) == ["manifest.json", "step-00000060.pt", "step-00000070.pt"]


def find_checkpoint_step(folder: Path) -> int:
    checkpoints = folder.parent / "run" / "checkpoints"
    shutil.copytree(folder, checkpoints)
    return read_checkpoint(find_checkpoint(checkpoints.parent)[1])["step"]


def test_a_writer_killed_as_it_wrote_the_same_step_again_leaves_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it dies before the new file has its name or after."""
    for kill_at in ("_write_checked", "_outdated"):
        save(tmp_path, 7, keep=1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, kill_at, killed)
            save(tmp_path, 7, keep=1, best=True)
        assert newest_step(tmp_path) == 7


def killed(*args: object) -> None:
    raise KeyboardInterrupt


class Killed(BaseException):
    """In the place of kill -9."""


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
@pytest.mark.parametrize("file_without_entry", [False, True])
def test_a_writer_killed_before_any_change_of_the_folder_leaves_the_last_or_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_without_entry: bool, again: bool
) -> None:
    last = 4 if file_without_entry else 3
    step = last if again else last + 1
    found = []
    for allowed in range(100):
        folder = tmp_path / str(allowed)
        for earlier in (1, 2, 3):
            save(folder, earlier)
        if file_without_entry:
            shutil.copy(save(tmp_path / "other", 4), folder)
        with monkeypatch.context() as patches:
            kill_before_change(patches, allowed)
            try:
                save(folder, step)
            except Killed:
                found.append(newest_step(folder))
            else:
                break
        save(folder, 9, best=True)
        assert newest_step(folder) == 9
        assert len(list(folder.glob("step-*.pt"))) == 2
    assert newest_step(folder) == step
    assert len(found) >= 3
    assert found == sorted(found)
    assert set(found) <= {last, step}


def kill_before_change(patches: pytest.MonkeyPatch, allowed: int) -> None:
    """So many files are renamed or deleted; at the next one the process is dead, and does nothing more."""
    done = 0

    def counted(change: Callable) -> Callable:
        def act(*args: object, **options: object) -> object:
            nonlocal done
            if done == allowed:
                raise Killed
            done += 1
            return change(*args, **options)

        return act

    patches.setattr(os, "replace", counted(os.replace))
    patches.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "empty"])
def test_a_spoilt_file_is_set_aside_and_the_one_before_taken(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-10])
    elif damage == "flip":
        flip(path, 4 * len(content))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(InputError, match="step-00000002"):
        read_checkpoint(path)
    assert newest_step(tmp_path) == 1
    assert "step-00000002.pt IS BAD" in caplog.text
    assert "going on from step-00000001.pt" in caplog.text
    assert not path.exists()
    assert (tmp_path / "step-00000002.pt.bad").exists() == (damage != "delete")
    save(tmp_path, 2)  # the run comes by again
    caplog.clear()
    assert newest_step(tmp_path) == 2
    assert not caplog.records


def test_a_bit_flipped_anywhere_is_found(tmp_path: Path) -> None:
    """Whatever bit of the newest checkpoint, or of the manifest: what is loaded is what was saved, and the run goes on."""
    saved = tmp_path / "saved"
    save(saved, 1)
    path = save(saved, 2)
    draw = np.random.default_rng(0)
    for _ in range(60):
        folder = tmp_path / "flipped"
        shutil.copytree(saved, folder)
        flip(folder / path.name, int(draw.integers(8 * path.stat().st_size)))
        assert newest_step(folder) == 1
        shutil.rmtree(folder)
    taken = set()
    for _ in range(60):
        shutil.copytree(saved, folder)
        flip(folder / "manifest.json", int(draw.integers(8 * (saved / "manifest.json").stat().st_size)))
        step = newest_step(folder)
        assert step is not None
        taken.add(step)
        assert save(folder, 3).is_file()
        assert newest_step(folder) == 3
        shutil.rmtree(folder)
    assert taken == {1, 2}  # 1: the digest of 2 was hit, which must then count as bad


def test_checksums_inside_find_a_flipped_bit_where_the_manifest_is_gone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (tmp_path / "manifest.json").unlink()
    assert newest_step(tmp_path) == 2
    flip(path, 4 * path.stat().st_size)  # of a tensor: the file is mostly one
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"step-00000001.pt": 3, "step-00000004.pt": {"sha256": 1}}'])
def test_where_the_manifest_is_spoilt_nothing_is_deleted_that_may_be_the_best(tmp_path: Path, manifest: str | None) -> None:
    for step in range(1, 5):
        save(tmp_path, step, best=step == 1)
    if manifest is None:
        (tmp_path / "manifest.json").unlink()
    else:
        (tmp_path / "manifest.json").write_text(manifest)
    before = {path.name for path in tmp_path.glob("*.pt")}
    if manifest and "step-00000001" in manifest:
        before.remove("step-00000003.pt")  # not in it: as of a killed writer
    for step in (5, 6, 7):
        save(tmp_path, step, best=False)
        assert newest_step(tmp_path) == step
    assert {path.name for path in tmp_path.glob("*.pt")} == before - {"step-00000005.pt"} | {"step-00000006.pt", "step-00000007.pt"}
    save(tmp_path, 8, best=True)
    assert names(tmp_path) == ["manifest.json", "step-00000007.pt", "step-00000008.pt"]


def test_a_file_that_the_disk_does_not_give_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    read = Path.read_bytes
    lost: list[Path] = []

    def failing(path: Path) -> bytes:
        if path in lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    lost.append(newer)
    assert newest_step(tmp_path) == 1
    assert "CHECKPOINT step-00000002.pt CAN'T BE READ and is left alone; going on from step-00000001.pt" in caplog.text
    lost.append(older)
    for look in (lambda: newest_checkpoint(tmp_path), lambda: read_checkpoint(older)):
        with pytest.raises(InputError, match=r"can't be read \(Input/output error\); try again"):
            look()
    lost.clear()
    assert newest_step(tmp_path) == 2


def test_what_does_not_load_says_so(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, memoryview(b"not of torch"), 1, 1, {})
    with pytest.raises(InputError, match=r"step-00000001\.pt: does not load"):
        read_checkpoint(path)


def test_where_none_is_good_nothing_starts_anew_by_itself(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    path = save(tmp_path, 1)
    flip(path, 4 * path.stat().st_size)
    for _ in range(2):
        with pytest.raises(InputError, match="no checkpoint in it is good"):
            newest_checkpoint(tmp_path)
    (tmp_path / "step-00000001.pt.bad").unlink()
    assert newest_checkpoint(tmp_path) is None


def test_a_full_disk_spoils_no_earlier_file(tmp_path: Path, file_limit: Limit) -> None:
    save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for limit in (50, 3000):  # in the manifest; in the checkpoint
        with pytest.raises(OSError, match="File too large"), file_limit(limit):
            save(tmp_path, 2)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        assert not list(tmp_path.glob(".*"))


def test_a_disk_that_gives_back_other_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_digest_of", lambda stream: "another")
    with pytest.raises(OSError, match="other bytes"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["manifest.json", "step-00000001.pt"]


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-00000002.pt.abc.tmp", ".manifest.json.abc.tmp"):
        (tmp_path / name).write_bytes(b"half")
    other_rank = tmp_path / ".step-00000002.rank-1-of-2.pt.abc.tmp"  # another worker may be at it
    other_rank.write_bytes(b"half")
    save(tmp_path, 3)
    assert [path.name for path in tmp_path.glob(".*")] == [other_rank.name]


def test_whoever_is_killed_while_writing_goes_on_from_a_whole_checkpoint() -> None:
    """A few of the kills of scripts/kill_while_writing.py, which makes a hundred."""
    script = Path(__file__).parents[2] / "scripts" / "kill_while_writing.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, "--kills", "6"], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 runs resumed" in done.stdout


def test_a_file_whose_writer_was_killed_before_the_manifest_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = (tmp_path / "manifest.json").read_bytes()
    save(tmp_path, 2)
    (tmp_path / "manifest.json").write_bytes(manifest)
    assert newest_step(tmp_path) == 2
    save(tmp_path, 3)
    assert sorted(json.loads((tmp_path / "manifest.json").read_text())) == ["step-00000001.pt", "step-00000003.pt"]
    assert not (tmp_path / "step-00000002.pt").exists()


def save_own(folder: Path, step: int, size: int = 2, best: bool = False) -> None:
    write_rank_state(folder, serialised({"residual": torch.full((100,), float(step))}), step, rank=1, size=size, keep=2, notes={"best": best})


def own_steps(folder: Path, size: int = 2) -> list[int]:
    return [step for step in range(100) if read_rank_state(folder, step, rank=1, size=size) is not None]


def test_what_is_a_worker_s_own_stays_as_long_as_its_checkpoint(tmp_path: Path) -> None:
    """By the same rule on a disk of its own; it goes with the checkpoint on a disk that all share, also what is of fewer or more workers."""
    alone, all_share = tmp_path / "alone", tmp_path / "shared"
    for step, best in ((1, True), (2, False), (70, False), (80, False), (60, False)):
        for folder in (alone, all_share):
            save_own(folder, step, best=best)
        save(all_share, step, best=best)
    assert own_steps(alone) == own_steps(all_share) == [1, 60, 80]
    save_own(all_share, 3, size=3)
    for step in (61, 62):
        save(all_share, step, best=True)
    assert own_steps(all_share) == []
    assert own_steps(all_share, size=3) == [3]  # its checkpoint was never there


def test_what_is_a_worker_s_own_in_a_folder_of_an_earlier_version(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_own(tmp_path, step)
    (tmp_path / "manifest.rank-1.json").unlink()
    assert own_steps(tmp_path) == [2, 3]
    save_own(tmp_path, 4)
    assert 4 in own_steps(tmp_path)


def test_what_is_a_worker_s_own_is_found_to_be_spoilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save_own(tmp_path, step)
    assert own_steps(tmp_path) == [2, 3]
    found = read_rank_state(tmp_path, 3, rank=1, size=2)
    assert found is not None
    assert torch.equal(found["residual"], torch.full((100,), 3.0))
    assert read_rank_state(tmp_path, 3, rank=1, size=3) is None
    path = tmp_path / "step-00000003.rank-1-of-2.pt"
    flip(path, 4 * path.stat().st_size)
    with caplog.at_level(logging.ERROR, "horoyolo"):
        assert read_rank_state(tmp_path, 3, rank=1, size=2) is None
    assert "goes on without it" in caplog.text


def test_resume_takes_a_run_a_checkpoint_or_its_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 5)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "last.pt").write_bytes(b"")
    for target in (tmp_path, path, weights / "last.pt"):
        assert find_checkpoint(target) == (tmp_path, path)


def test_resume_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no good checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no run folder"):
        find_checkpoint(tmp_path / "absent")
