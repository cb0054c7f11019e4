"""The ledger is kept through failures: whoever is rank 0 writes it, and adds what the one before had not written."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from horoyolo.data.sampler import Sampler
from horoyolo.engine import ledger
from horoyolo.engine.ledger import Ledger, WriteLedger, note_update
from horoyolo.engine.state import Progress, Standing, TrainState
from horoyolo.report.ledger import FILE, HEADER, read_account

BATCH, POSITIONS, EPOCHS, ACCUMULATE = 4, 30, 3, 3


class Worker:
    """One worker of a run as its ledger sees it."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.place = rank
        self.sampler = Sampler(POSITIONS, BATCH, 0)
        self.progress = Progress()
        self.ledger = Ledger()
        self.parts = TrainState(sampler=self.sampler, progress=self.progress, ledger=self.ledger)
        self.standing = Standing(self.parts, nn.BatchNorm1d(1))
        self.comm = SimpleNamespace(rank=lambda: self.place, size=lambda: 3)
        self.run = SimpleNamespace(folder=folder)
        self.hook = WriteLedger(self)  # type: ignore[arg-type]

    def step(self, finite: bool = True, told: bool = True) -> None:
        """A global batch, as the training loop counts it; ``told`` False: it fails before its hooks are called."""
        if self.sampler.consumed == POSITIONS:
            self.sampler.next_epoch()
            self.standing.mark()
        self.sampler.advance(min(BATCH, POSITIONS - self.sampler.consumed))
        self.progress.step += 1
        if self.progress.step - self.progress.last_update_step == ACCUMULATE or self.sampler.consumed == POSITIONS:
            self.progress.last_update_step = self.progress.step
            self.progress.update += finite
            note_update(self, finite)  # type: ignore[arg-type]
            self.standing.mark()
        if told:
            self.hook.after_step(SimpleNamespace(step=self.progress.step), None)  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        return self.parts.state_dict()

    def stand_at(self, state: dict[str, Any]) -> None:
        self.parts.load_state_dict(state)
        self.standing.mark()

    def finish(self) -> None:
        while (self.sampler.epoch, self.sampler.consumed) != (EPOCHS - 1, POSITIONS):
            self.step()
        self.hook.after_train()


def test_a_run_without_failures_is_exact(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    worker.step(finite=False)
    worker.step(finite=False)
    worker.step(finite=False)
    worker.finish()
    found = read_account(tmp_path / FILE)
    assert found.exact
    assert (found.finished_epochs, found.images, found.skipped_updates, found.skipped_images) == (3, 90, 1, 12)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("torn", [0, 1, 7])
@pytest.mark.parametrize("lost_lines", [0, 1, 2])
def test_the_next_rank_0_adds_what_is_missing(tmp_path: Path, lost_lines: int, torn: int) -> None:
    """Rank 0 dies; its host may not have written its last lines to the shared disk, or only a part of one."""
    workers = [Worker(tmp_path, rank) for rank in range(3)]
    for _ in range(13):
        for worker in workers:
            worker.step()
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
    kept = "".join(lines[: len(lines) - lost_lines])
    (tmp_path / FILE).write_text(kept[: len(kept) - torn])
    survivors = workers[1:]
    for rank, worker in enumerate(survivors):
        worker.place = rank
    for _ in range(20):
        for worker in survivors:
            worker.step()
    found = read_account(tmp_path / FILE)
    assert found.exact
    assert found.unreadable_lines == (torn > 1)
    assert (found.finished_epochs, found.images) == (4, 4 * POSITIONS)


def test_an_update_that_died_with_its_worker_is_taken_back(tmp_path: Path) -> None:
    """Rank 0 completed an update that no survivor did; they stand at the one before and do it again."""
    first, second = Worker(tmp_path, 0), Worker(tmp_path, 1)
    for _ in range(ACCUMULATE):
        first.step()
        second.step()
    agreed = second.state()
    for _ in range(ACCUMULATE):
        first.step()
    second.step()  # a batch of the update that will fail
    second.stand_at(agreed)
    second.place = 0
    second.finish()
    found = read_account(tmp_path / FILE)
    assert found.exact
    assert found.finished_epochs == EPOCHS
    assert found.redone_updates <= 1


def test_an_update_that_rank_0_took_over_from_another_is_in_it(tmp_path: Path) -> None:
    """Rank 0 did not complete an update, another survivor did, and rank 0 takes its weights."""
    first, second = Worker(tmp_path, 0), Worker(tmp_path, 1)
    for _ in range(ACCUMULATE + 1):
        first.step()
        second.step()
    for _ in range(ACCUMULATE - 1):
        second.step(told=False)
    first.stand_at(second.state())
    first.finish()
    found = read_account(tmp_path / FILE)
    assert found.exact
    assert found.finished_epochs == EPOCHS
    assert found.redone_updates == 0


def test_a_run_that_goes_on_from_a_checkpoint_takes_back_what_came_after(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    for _ in range(2 * ACCUMULATE):
        worker.step()
    checkpoint = worker.state()
    for _ in range(10):
        worker.step()
    worker.hook.after_train()
    resumed = Worker(tmp_path)
    resumed.stand_at(checkpoint)
    resumed.hook.before_train()
    assert read_account(tmp_path / FILE).unfinished_epoch == (0, checkpoint["sampler"]["consumed"], POSITIONS)  # at once, whatever comes
    resumed.finish()
    found = read_account(tmp_path / FILE)
    assert found.exact
    assert found.finished_epochs == EPOCHS
    assert found.redone_updates == 4 + 1


def test_a_full_disk_stops_nothing_and_leaves_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    full = False

    def write(descriptor: int, content: bytes) -> int:
        return os.write(descriptor, content[:5] if full else content)

    monkeypatch.setattr(ledger, "os", SimpleNamespace(**{name: getattr(os, name) for name in dir(os)} | {"write": write}))
    worker = Worker(tmp_path)
    with caplog.at_level(logging.ERROR, "horoyolo"):
        for step in range(20):
            full = 5 <= step < 12
            worker.step()
    worker.finish()
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text
    assert read_account(tmp_path / FILE).exact


def test_others_write_nothing(tmp_path: Path) -> None:
    worker = Worker(tmp_path, rank=1)
    worker.finish()
    assert not list(tmp_path.iterdir())


def test_the_first_line_names_the_columns(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    worker.finish()
    assert (tmp_path / FILE).read_text().startswith(HEADER)
    assert HEADER == "since,step,update,epoch,first,stop,of,workers,skipped\n"
