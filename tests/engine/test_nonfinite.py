"""NaN: an update with one is left out and leaves no trace; many in a row lead back to a good state, at a lower rate."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from horoyolo.engine.build import Training
from horoyolo.engine.loss_scale import LossScale
from horoyolo.engine.state import TrainingError
from horoyolo.engine.stop import StopRequest
from horoyolo.engine.train import Outcome, train
from horoyolo.engine.watch import RecordFigures, WriteLedger
from horoyolo.report.ledger import FILE, read_account

Open = Callable[..., Training]

MOST_SKIPPED = 3


class Spoilt:
    """The loss of a job, NaN where ``bad`` says so of the number of times that it was asked."""

    def __init__(self, job: Training, bad: Callable[[int], bool]) -> None:
        self._loss = job.loss
        self._bad = bad
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._loss, name)

    def __call__(self, *args: object) -> Tensor:
        self.asked += 1
        losses = self._loss(*args)  # type: ignore[arg-type]
        return losses * float("nan") if self._bad(self.asked) else losses


def run(job: Training, bad: Callable[[int], bool]) -> Spoilt:
    loss = Spoilt(job, bad)
    job.loss = loss  # type: ignore[assignment]
    assert train(job, [WriteLedger(job), RecordFigures(job)], StopRequest()) is Outcome.DONE
    return loss


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few updates make a row, and nothing is scored or saved."""
    monkeypatch.setattr("horoyolo.engine.train.MOST_SKIPPED", MOST_SKIPPED)
    for name in ("save_weights", "save_checkpoint"):
        monkeypatch.setattr(Training, name, lambda *args: None)
    scores = dict.fromkeys(("map50", "map50_95", "precision", "recall"), 0.0)
    monkeypatch.setattr(Training, "evaluate", lambda self, model: (dict(scores), [0.0, 0.0, 0.0]))


def test_one_bad_update_is_left_out_and_changes_nothing_else(open_job: Open, caplog: pytest.LogCaptureFixture) -> None:
    job = open_job(epochs=1)
    seen: list[tuple[bool, Tensor, Tensor]] = []

    def bad(asked: int) -> bool:
        seen.append((asked == 3, job.model.state_dict()["model.0.conv.weight"].clone(), job.standing.buffers[0].clone()))
        return asked == 3

    run(job, bad)
    assert torch.equal(seen[2][1], seen[3][1])
    assert not torch.equal(seen[1][1], seen[2][1])
    assert torch.equal(seen[2][2], seen[3][2])
    assert job.progress.update == 3
    assert job.progress.skipped_updates == 0
    assert "gradient of model.0.conv.weight is not finite" in caplog.text
    account = read_account(job.run.folder / FILE)
    assert account.exact
    assert (account.updates, account.skipped_updates) == (4, 1)


def test_many_in_a_row_lead_back_at_a_lower_rate(open_job: Open, caplog: pytest.LogCaptureFixture) -> None:
    job = open_job(epochs=4, **{"hyp.warmup_epochs": 0})
    first_bad = 6
    loss = run(job, lambda asked: first_bad <= asked < first_bad + MOST_SKIPPED)
    assert job.progress.returns == 1
    assert "back to update 0" in caplog.text or "back to update 4" in caplog.text
    assert loss.asked == 16 + MOST_SKIPPED + (first_bad - 1 - int(caplog.text.partition("back to update ")[2].partition(",")[0]))
    with (job.run.folder / "steps.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == list(range(1, 17))
    assert float(rows[0]["lr"]) in (0.01, 0.005)
    assert float(rows[8]["lr"]) == pytest.approx(0.5 * job.schedule.at(2, 8).lr)
    account = read_account(job.run.folder / FILE)
    assert account.exact
    assert account.finished_epochs == 4
    assert account.skipped_updates == 0
    assert account.redone_updates >= MOST_SKIPPED


def test_a_return_to_the_end_of_an_epoch_ends_that_epoch(open_job: Open, tmp_path: Path) -> None:
    job = open_job(epochs=8, batch=8, **{"hyp.warmup_epochs": 0, "recipe.patience": 2})  # one update an epoch: each state is that after its last
    run(job, lambda asked: 5 <= asked < 5 + MOST_SKIPPED)
    assert job.progress.returns == 1
    with (job.run.folder / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["epoch"]) for row in rows] == list(range(8))
    assert float(rows[-1]["lr"]) == pytest.approx(0.5 * job.schedule.at(7, 7).lr)


def test_a_run_that_can_not_recover_ends_after_three_returns(open_job: Open) -> None:
    job = open_job(epochs=40)
    with pytest.raises(TrainingError, match=r"3 updates in a row were not finite; the first bad tensor was gradient of .*gone back 3 times"):
        run(job, lambda asked: asked > 2)
    assert job.progress.returns == 3


def test_a_weight_that_is_not_finite_is_named(open_job: Open) -> None:
    job = open_job(epochs=40)
    with torch.no_grad():
        job.model.model[1].conv.weight[0] = float("nan")
    with pytest.raises(TrainingError, match=r"bad tensor was weight model.1.conv.weight.*no good state"):
        run(job, lambda asked: False)


def test_the_settling_of_a_loss_scale_does_not_count(open_job: Open) -> None:
    job = open_job(epochs=2)
    job.loss_scale = LossScale(enabled=True)
    job.loss_scale.value = 2.0**5
    run(job, lambda asked: asked <= 5)  # down to 1
    assert job.progress.returns == 0
    assert job.progress.update == 8 - 5
