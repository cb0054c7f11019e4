"""Notes of workers, in a folder that several hosts may see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from horoyolo.launch.status import STATUS_DIR, announced_workers, make_folder, remove_notes, report_status, reported_statuses, take_status


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch):
    """``on_host(name)``: from now on this is that host."""

    def be(name: str) -> None:
        monkeypatch.setattr("horoyolo.launch.status._host", lambda: name)

    return be


def test_hosts_that_see_one_folder_share_it_until_the_last_leaves(on_host, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "not there yet" / "job"
    monkeypatch.setenv(STATUS_DIR, str(folder))
    for host in ("n1", "n1.cluster", "n2"):
        on_host(host)
        make_folder(folder)
    on_host("n2")
    assert report_status(75) == 0
    on_host("n1")
    assert report_status(2) == 2
    assert sorted(reported_statuses(folder).values()) == [2, 75]
    assert announced_workers(folder) == []
    remove_notes(folder)
    assert reported_statuses(folder) == {f"status.n2.{os.getpid()}": 75}
    assert take_status(folder, os.getpid()) is None  # it is another host's
    remove_notes(folder)  # again: others are still there
    on_host("n1.cluster")
    remove_notes(folder)
    assert folder.is_dir()
    on_host("n2")
    remove_notes(folder)
    assert not folder.exists()


def test_an_agent_takes_over_what_an_earlier_one_left(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    make_folder(folder)
    make_folder(folder)
    remove_notes(folder)
    assert not folder.exists()


def test_somebody_elses_folder_is_not_taken(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "job").symlink_to(tmp_path / "own")
    monkeypatch.setattr("horoyolo.launch.status.os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="another user"):
        make_folder(tmp_path / "job")


def test_a_run_that_is_done_ends_well_where_no_more_notes_go(monkeypatch, file_limit, tmp_path: Path) -> None:
    monkeypatch.setenv(STATUS_DIR, str(tmp_path))
    with file_limit(0):
        assert report_status(0) == 0
        assert report_status(75) == 75
    assert reported_statuses(tmp_path) == {}
