"""The ledger proves that each position was used once, or says which was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horoyolo.cli import main
from horoyolo.config import InputError
from horoyolo.report.ledger import FILE, HEADER, Span, Update, account, parse_line, read_account, standing

POSITIONS = 10


def updates_of(sizes: list[int], epochs: int, positions: int = POSITIONS, workers: int = 2) -> list[Update]:
    """The updates of whole epochs: ``sizes`` images in turn, one global batch each."""
    found: list[Update] = []
    for epoch in range(epochs):
        first = 0
        while first < positions:
            stop = min(positions, first + sizes[len(found) % len(sizes)])
            found.append(Update(len(found), len(found) + 1, len(found) + 1, epoch, first, stop, positions, workers, 0))
            first = stop
    return found


def test_whole_epochs_are_exact() -> None:
    found = account(updates_of([4], epochs=3))
    assert found.exact
    assert (found.finished_epochs, found.unfinished_epoch, found.images, found.redone_updates) == (3, None, 30, 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3), st.integers(5, 20), st.lists(st.integers(1, 6), max_size=6))
def test_a_run_that_goes_back_and_on_stays_exact(sizes: list[int], epochs: int, positions: int, backs: list[int]) -> None:
    """However often updates are taken back and done again, by other numbers of workers: what stands tiles every epoch."""
    plan = updates_of(sizes, epochs, positions)
    file: list[Update] = []
    for workers, back in enumerate(backs, start=3):
        done = len(standing(file))
        until = min(len(plan), done + 3)
        file += [replace(update, workers=workers) for update in plan[done:until]]
        redo_from = max(0, len(standing(file)) - back)
        if redo_from < len(plan) and redo_from < len(standing(file)):
            file.append(plan[redo_from])
    file += plan[len(standing(file)) :]
    found = account(file)
    assert found.exact, found.lines()
    assert (found.updates, found.images, found.finished_epochs) == (len(plan), epochs * positions, epochs)
    assert found.redone_updates == len(file) - len(plan)


@given(st.integers(0, 8), st.data())
def test_an_update_that_is_missing_or_too_much_is_found(index: int, data: st.DataObject) -> None:
    plan = updates_of([4], epochs=3)
    gone = plan[index]
    if index == 8:  # the run's very last one: then its last epoch is not finished
        assert account(plan[:index]).unfinished_epoch == (2, 8, 10)
        return
    left = account(plan[:index] + plan[index + 1 :])
    assert left.missing == [Span(gone.epoch, gone.first, gone.stop)]
    assert not left.exact
    twice = account([*plan, Update(9, 10, 10, gone.epoch, gone.first, gone.stop, POSITIONS, 2, 0)])
    assert twice.double == [Span(gone.epoch, gone.first, gone.stop)]
    assert not twice.exact


def test_the_last_epoch_may_be_unfinished_and_skipped_updates_are_told() -> None:
    plan = updates_of([4], epochs=2)[:4]
    plan[1] = Update(1, 2, 1, 0, 4, 8, POSITIONS, 3, 1)
    found = account(plan)
    assert found.exact
    assert found.unfinished_epoch == (1, 4, 10)
    assert (found.skipped_updates, found.skipped_images) == (1, 4)
    assert (found.fewest_workers, found.most_workers) == (2, 3)


def test_an_update_over_several_batches_takes_back_all_it_covers() -> None:
    """Resumed with another accumulation: the new line ends later than those that it does again."""
    single = updates_of([2], epochs=1)
    found = account([*single[:4], Update(1, 5, 2, 0, 2, 10, POSITIONS, 1, 0)])
    assert found.exact
    assert found.redone_updates == 3


def test_a_line_is_read_as_it_was_written_and_a_torn_one_is_not() -> None:
    update = updates_of([4], 1)[0]
    line = update.line()
    assert parse_line(line) == update
    fields = line.strip().split(",")
    assert parse_line(",".join(fields[:-1])) is None
    assert parse_line(",".join([*fields[:-1], "x"])) is None


def test_report_gives_the_proof_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [update.line() for update in updates_of([4], epochs=2)]
    (tmp_path / FILE).write_text(HEADER + "".join(lines[:3]) + "1,2,3\n" + "".join(lines[3:]))
    assert main(["report", str(tmp_path), "--ledger", "--json", str(tmp_path / "out.json")]) == 0
    assert "each position was used exactly once" in capsys.readouterr().out
    assert '"exact": true' in (tmp_path / "out.json").read_text()

    (tmp_path / FILE).write_text(HEADER + "".join(lines[:1] + lines[2:]))
    assert main(["report", str(tmp_path), "--ledger"]) == 1
    assert "4 positions used by no update: epoch 0: 4 to 7" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), ("a,b\n", "not a ledger"), ("", "not a ledger"), (HEADER, "no update")])
def test_what_is_no_ledger_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=reason):
        read_account(tmp_path / FILE)
