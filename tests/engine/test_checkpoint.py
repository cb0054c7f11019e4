"""Checkpoints cannot be torn, and a spoilt one is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from horoyolo.config import InputError
from horoyolo.engine.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, {"value": torch.full((1000,), float(step)), "step": step}, step, keep=2, notes={"epoch": 0})


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    state = read_checkpoint(path)
    assert state["step"] == 7
    assert torch.equal(state["value"], torch.full((1000,), 7.0))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step-00000004.pt", "step-00000030.pt"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 30


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_spoilt_file_is_found_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-10])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(InputError, match="step-00000002"):
        read_checkpoint(path)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1


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


def test_a_file_without_an_entry_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="no entry"):
        read_checkpoint(path)
