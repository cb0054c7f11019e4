"""Copies of a data set on this machine: whole and checked under their name, or not there; what ends copying ends it all."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from horoyolo.launch import stage
from horoyolo.launch.hosts import Host
from horoyolo.launch.stage import Stage, StageError

HERE = Host("localhost", 1)


@dataclass(frozen=True)
class Files:
    """A layout without a data set: the check is replaced by one of the files' bytes (`checked_by_bytes`)."""

    files: Sequence[tuple[str, Path]]
    texts: Mapping[str, str] = field(default_factory=lambda: {"data.yaml": "names: [x]\n"})
    name: str = "blood-0123456789ab"

    @property
    def hash(self) -> str:
        return bytes_hash({name: path.read_bytes() for name, path in self.files})


def bytes_hash(contents: Mapping[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "source").mkdir()
    named = []
    for number in range(4):
        path = tmp_path / "source" / f"image {number}.jpg"
        path.write_bytes(os.urandom(30_000))
        named.append((f"images/train/it's $HOME {number}.jpg", path))
    return Files(named)


@pytest.fixture(autouse=True)
def checked_by_bytes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compare the files themselves in place of a label scan, which tests/lab does for real; gives the folders that were checked."""
    checked = []

    def is_right(self: Stage, host: Host, folder: str) -> bool:
        checked.append(folder)
        found = {name: Path(folder, name).read_bytes() for name, _ in self._layout.files if Path(folder, name).is_file()}
        return bytes_hash(found) == self._layout.hash

    monkeypatch.setattr(Stage, "_is_right", is_right)
    return checked


def staged(files: Files, directory: Path) -> tuple[Stage, list[str]]:
    """A stage to this machine, and what it says."""
    said: list[str] = []
    return Stage(files, directory, say=said.append), said


def test_a_copy_lies_under_its_name_when_it_is_whole_and_is_not_made_twice(files: Files, tmp_path: Path, checked_by_bytes: list[str]) -> None:
    directory = tmp_path / "a disk; with 'signs'"
    first, said = staged(files, directory)
    assert not first.is_ready(HERE)
    assert first.stage_all([HERE]) == []
    assert first.is_ready(HERE)
    assert first.data == f"{directory}/{files.name}/data.yaml"
    assert Path(first.data).read_text() == "names: [x]\n"
    assert [path.name for path in directory.iterdir()] == [files.name]
    assert checked_by_bytes == [f"{directory}/.{files.name}.localhost.partial"]  # before it got its name
    assert said == [f"stage: localhost: {directory}/{files.name} is there and checked"]

    before = {path: path.stat().st_ino for path in directory.rglob("*")}
    second, said = staged(files, directory)
    assert second.stage_all([HERE]) == []
    assert {path: path.stat().st_ino for path in directory.rglob("*")} == before
    assert said == [f"stage: localhost: {directory}/{files.name} is there already"]
    assert len(checked_by_bytes) == 2


def test_a_line_for_the_user_is_written_at_once(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that serve other hosts write there too: between a line and its end would be room for theirs."""
    written: list[str] = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    directory = tmp_path / "disk"
    assert Stage(files, directory).stage_all([HERE]) == []
    assert written == [f"stage: localhost: {directory}/{files.name} is there and checked\n"]


def test_what_an_earlier_attempt_left_is_used_and_not_believed(files: Files, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    partial = directory / f".{files.name}.localhost.partial" / "images/train"
    partial.mkdir(parents=True)
    whole, wrong = (partial / Path(name).name for name, _ in files.files[:2])
    shutil.copy2(files.files[0][1], whole)
    shutil.copy2(files.files[1][1], wrong)
    stamp = wrong.stat()
    wrong.write_bytes(bytes(stamp.st_size))  # of the right size and time, but not the right file
    os.utime(wrong, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    kept = whole.stat().st_ino
    attempt, _ = staged(files, directory)
    assert attempt.stage_all([HERE]) == []
    assert (directory / files.name / files.files[0][0]).stat().st_ino == kept
    assert (directory / files.name / files.files[1][0]).read_bytes() == files.files[1][1].read_bytes()


def test_a_copy_that_is_wrong_loses_its_name_and_is_repaired(files: Files, tmp_path: Path) -> None:
    staged(files, tmp_path / "disk")[0].stage_all([HERE])
    spoilt = tmp_path / "disk" / files.name / files.files[0][0]
    spoilt.write_bytes(b"x")
    again, said = staged(files, tmp_path / "disk")
    assert again.stage_all([HERE]) == []
    assert "repairing it" in said[0]
    assert spoilt.read_bytes() == files.files[0][1].read_bytes()


def test_a_copy_that_stays_wrong_never_gets_the_name(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "_is_right", lambda *_: False)
    attempt, _ = staged(files, tmp_path / "disk")
    (problem,) = attempt.stage_all([HERE])
    assert problem.startswith("localhost: the copy in ")
    assert "is not what was sent; check its disk and memory" in problem
    assert not (tmp_path / "disk" / files.name).exists()
    assert not attempt.is_ready(HERE)


def test_room_is_looked_for_before_anything_is_copied(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MARGIN_BYTES", 10**18)
    attempt, _ = staged(files, tmp_path / "disk")
    (problem,) = attempt.stage_all([HERE])
    assert f"localhost: {tmp_path / 'disk'} has " in problem
    assert "the data set needs 1000000.0 TB more: make room there, or give --stage another folder" in problem
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_folder_that_can_not_be_made_is_named(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = staged(files, tmp_path / "file" / "disk")[0].stage_all([HERE])
    assert problem.startswith(f"localhost: {tmp_path / 'file' / 'disk'} can't be used: mkdir: ")
    assert problem.endswith("give --stage a folder that can be written to there")


def test_a_file_that_has_gone_is_named(files: Files, tmp_path: Path) -> None:
    attempt, _ = staged(files, tmp_path / "disk")
    gone = files.files[2][1]
    gone.unlink()
    (problem,) = attempt.stage_all([HERE])
    assert problem == f"{gone} can't be read on this machine: No such file or directory; see to it and start again"


def test_hosts_without_rsync_here(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert staged(files, tmp_path / "disk")[0].stage_all([HERE]) == ["this machine has no rsync, which copies the data: apt install rsync"]


def test_stopping_ends_all_copying(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "bin" / "rsync"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    attempt, _ = staged(files, tmp_path / "disk")
    problems: list[str] = []
    thread = threading.Thread(target=lambda: problems.extend(attempt.stage_all([HERE, Host("127.0.0.1", 1)])))
    thread.start()
    deadline_s = time.monotonic() + 10
    while len([process for process in attempt._running if process.args[0] == "rsync"]) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    attempt.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert len(problems) == 2
    assert not (tmp_path / "disk" / files.name).exists()
    with pytest.raises(StageError, match="stopped"):
        attempt.stage_host(HERE)


def test_a_host_that_joins_is_held_back_until_it_has_its_copy(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, said = staged(files, tmp_path / "disk")
    assert attempt.stage_all([HERE]) == []
    joining = Host("127.0.0.1", 1)
    shutil.rmtree(tmp_path / "disk")
    may_go_on = threading.Event()
    stage_host = Stage.stage_host
    started = []

    def wait_then_stage(self: Stage, host: Host) -> None:
        started.append(host.name)
        assert may_go_on.wait(10)
        stage_host(self, host)

    monkeypatch.setattr(Stage, "stage_host", wait_then_stage)
    for _ in range(3):
        assert attempt.ready_hosts([HERE, joining]) == [HERE]  # at once, however long the copy takes
    may_go_on.set()
    deadline_s = time.monotonic() + 10
    while attempt.ready_hosts([HERE, joining]) != [HERE, joining]:
        assert time.monotonic() < deadline_s, said
        time.sleep(0.01)
    assert started == ["127.0.0.1"]


def test_a_joining_host_that_fails_is_tried_again_later(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "RETRY_S", 0.2)
    (tmp_path / "disk").write_text("in the way")
    attempt, said = staged(files, tmp_path / "disk")
    deadline_s = time.monotonic() + 10
    while not said:
        assert attempt.ready_hosts([HERE]) == []
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert said[0].endswith("localhost gets no workers until that works")
    (tmp_path / "disk").unlink()
    while attempt.ready_hosts([HERE]) != [HERE]:
        assert time.monotonic() < deadline_s, said
        time.sleep(0.01)
