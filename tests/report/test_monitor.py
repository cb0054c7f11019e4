"""Figures reach their files whole, and a resumed run goes on without repeating a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from horoyolo.report.monitor import CsvWriter, Progress, TensorBoardWriter

COLUMNS = ["step", "loss"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(path: Path, steps: range, after_step: int = 0) -> None:
    writer = CsvWriter(path, COLUMNS, after_step)
    for step in steps:
        writer.write(step, {"step": step, "loss": step / 3, "not a column": 1})
    writer.close()


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "steps.csv", COLUMNS)
    writer.write(1, {"step": 1, "loss": None})
    assert rows(tmp_path / "steps.csv") == [{"step": "1", "loss": ""}]
    writer.close()


Limit = Callable[[int], AbstractContextManager[None]]


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, file_limit: Limit) -> None:
    path = tmp_path / "steps.csv"
    writer = CsvWriter(path, COLUMNS)
    for step in range(1, 4):
        writer.write(step, {"step": step, "loss": 1 / 3})
    with file_limit(path.stat().st_size + 5):  # room for a part of a row
        for step in range(4, 7):
            writer.write(step, {"step": step, "loss": 1 / 3})
        assert path.read_text().endswith("3,0.33333333\n")  # no half of a row
    writer.write(7, {"step": 7, "loss": 1 / 3})
    writer.close()
    assert rows(path) == [{"step": str(step), "loss": "0.33333333"} for step in range(1, 8)]


def test_a_resumed_run_drops_the_rows_beyond_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    write(path, range(1, 6))
    write(path, range(4, 8), after_step=3)
    assert [row["step"] for row in rows(path)] == ["1", "2", "3", "4", "5", "6", "7"]
    write(path, range(1, 3))
    assert [row["step"] for row in rows(path)] == ["1", "2"]


def test_who_takes_a_file_over_on_a_full_disk_goes_on_with_it(tmp_path: Path, file_limit: Limit) -> None:
    path = tmp_path / "steps.csv"
    write(path, range(1, 6))
    path.write_text(path.read_text() + "6")
    with file_limit(10):
        writer = CsvWriter(path, COLUMNS, after_step=4)
        assert writer.last_step == 4
        assert [row["step"] for row in rows(path)] == ["1", "2", "3", "4"]
        writer.write(5, {"step": 5, "loss": 5 / 3})
    writer.write(6, {"step": 6, "loss": 2.0})
    writer.close()
    assert rows(path)[3:] == [{"step": step, "loss": loss} for step, loss in (("4", "1.3333333"), ("5", "1.6666667"), ("6", "2"))]


def test_a_new_file_on_a_full_disk_comes_when_it_can(tmp_path: Path, file_limit: Limit, caplog: pytest.LogCaptureFixture) -> None:
    path, away = tmp_path / "full" / "steps.csv", tmp_path / "away" / "steps.csv"
    path.parent.mkdir()
    with file_limit(4):  # not even room for the columns
        writers = [CsvWriter(each, COLUMNS) for each in (path, away)]
        for writer in writers:
            writer.write(1, {"step": 1, "loss": 1})
    assert path.read_bytes() == b""
    away.parent.mkdir()
    for writer in writers:
        writer.write(2, {"step": 2, "loss": 2})
        writer.close()
    assert rows(path) == rows(away) == [{"step": "1", "loss": "1"}, {"step": "2", "loss": "2"}]
    assert [record.message for record in caplog.records] == [f"steps.csv: {why}; its rows wait, training goes on" for why in WHY_NOT]


@pytest.mark.parametrize("room_bytes", [0, 5, None])
def test_going_back_keeps_the_rows_that_wait(tmp_path: Path, file_limit: Limit, room_bytes: int | None) -> None:
    """Of those beyond the step nothing stays, whether they are in the file (no limit), wait for room in it, or wait with its header."""
    path = tmp_path / "steps.csv"
    writer = CsvWriter(path, COLUMNS)
    if room_bytes:
        for step in (1, 2):
            writer.write(step, {"step": step, "loss": 1})
    with file_limit(2**20 if room_bytes is None else path.stat().st_size + room_bytes if room_bytes else 4):
        for step in range(3 if room_bytes else 1, 8):
            writer.write(step, {"step": step, "loss": 1})
        writer.go_back(5)
        assert writer.last_step == 5
    for step in (6, 7):
        writer.write(step, {"step": step, "loss": 2})
    writer.close()
    assert rows(path) == [{"step": str(step), "loss": "1" if step < 6 else "2"} for step in range(1, 8)]


WHY_NOT = ("No space left on device", "No such file or directory")


def test_events_end_where_there_is_no_room_for_any(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a file").touch()
    writer = TensorBoardWriter(tmp_path / "a file" / "tensorboard")
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert [record.message for record in caplog.records] == ["TensorBoard events: Not a directory; they end here, training goes on"]


def test_half_a_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    write(path, range(1, 4))
    path.write_text(path.read_text() + "4")
    write(path, range(4, 5), after_step=10)
    assert [row["step"] for row in rows(path)] == ["1", "2", "3", "4"]


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    progress = Progress(stream, every_s=0.0)
    progress.start("epoch 1/2", total=40, done=10)
    progress.advance(10, "loss 1")
    assert stream.getvalue() == "epoch 1/2 [##########..........] 20/40 images, loss 1\n"
    patient = io.StringIO()
    progress = Progress(patient, every_s=3600.0)
    progress.start("epoch 1/2", total=40)
    progress.advance(10, "loss 1")
    progress.close()
    assert patient.getvalue() == ""


def test_events_end_before_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    monkeypatch.setattr("horoyolo.report.monitor.ROOM_BYTES", 2**62)
    for step in (2, 3):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert [record.message for record in caplog.records] == ["TensorBoard events: No space left on device; they end here, training goes on"]
