"""Names of run folders, and what --resume finds."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from horoyolo.config import Config, InputError, load
from horoyolo.engine.checkpoint import serialised, write_checkpoint
from horoyolo.engine.runs import Run, new_folder, open_run, resumed_folder


def config_in(project: Path, **values: object) -> Config:
    return Config(data="d.yaml", cfg="yolov5n", project=str(project), **values)  # type: ignore[arg-type]


def saved_run(project: Path, name: str) -> Path:
    run = Run(project / name)
    run.create(config_in(project, name=name, batch=8))
    write_checkpoint(run.checkpoints, serialised({"step": 3}), 3, keep=1, notes={})
    return run.folder


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp2").touch()
    assert new_folder(tmp_path, "exp", exist_ok=False) == tmp_path / "exp3"
    assert new_folder(tmp_path, "exp", exist_ok=True) == tmp_path / "exp"


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path / "runs", "exp", exist_ok=False), range(8)))
    assert len(set(folders)) == 8


def test_opening_a_new_run_makes_its_folder_and_nothing_in_it(tmp_path: Path) -> None:
    run = open_run(config_in(tmp_path / "runs"))
    assert run.folder == tmp_path / "runs" / "exp"
    assert run.resumed is None
    assert [*(tmp_path / "runs").rglob("*")] == [run.folder]


def test_where_no_folder_can_be_made_a_run_has_its_name_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for project in (tmp_path / "file", tmp_path / "link", tmp_path / "link" / "train"):
        assert new_folder(project, "exp", exist_ok=False) == project / "exp"


def test_a_run_saves_its_configuration(tmp_path: Path) -> None:
    folder = saved_run(tmp_path, "a")
    assert load(folder / "config.yaml") == config_in(tmp_path, name="a", batch=8)


def test_a_configuration_that_is_saved_already_is_left_as_it_is(tmp_path: Path) -> None:
    path = saved_run(tmp_path, "a") / "config.yaml"
    inode = path.stat().st_ino
    os.utime(path, (1, 1))
    saved_run(tmp_path, "a")
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > 1  # the run that began last, for a bare --resume


@pytest.mark.parametrize("resume", ["auto", "newest", "folder", "checkpoint"])
def test_every_way_to_resume_finds_the_state(tmp_path: Path, resume: str) -> None:
    folder = saved_run(tmp_path, "a")
    target = {"folder": str(folder), "checkpoint": str(folder / "checkpoints" / "step-00000003.pt")}.get(resume, resume)
    config = config_in(tmp_path, name="a", resume=target)
    assert resumed_folder(config) == folder
    assert open_run(config) == Run(folder, {"step": 3})


def test_auto_starts_where_there_is_nothing_and_takes_the_name_exactly(tmp_path: Path) -> None:
    config = config_in(tmp_path, name="a", resume="auto")
    assert resumed_folder(config) is None
    assert open_run(config) == Run(tmp_path / "a")
    (tmp_path / "a").mkdir()  # a run that died before its first checkpoint
    assert open_run(config) == Run(tmp_path / "a")


def test_bare_resume_takes_the_newest_run(tmp_path: Path) -> None:
    older, newer = saved_run(tmp_path, "b"), saved_run(tmp_path, "a")
    os.utime(older / "config.yaml", (1, 1))
    assert resumed_folder(config_in(tmp_path, resume="newest")) == newer
    with pytest.raises(InputError, match="no run in"):
        resumed_folder(config_in(tmp_path / "empty", resume="newest"))
