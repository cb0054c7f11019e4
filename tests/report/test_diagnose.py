"""Courses of training that are plain to see, and what is said about them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from horoyolo.cli import main
from horoyolo.config import InputError
from horoyolo.report.diagnose import diagnose, diagnose_run

EPOCHS = 60
DONE = np.arange(EPOCHS) / (EPOCHS - 1)  # from 0 to 1
NOISE = np.random.default_rng(0).normal(0, 0.01, (3, EPOCHS))


def rows(train: np.ndarray, val: np.ndarray, score: np.ndarray, every: int = 1) -> list[dict[str, str]]:
    """A results.csv of these losses and mAP50-95 with a little noise, evaluated every so many epochs; objectness is what varies."""
    train, val, score = (values * (1 + noise) for values, noise in zip((train, val, score), NOISE, strict=True))
    table = []
    for epoch in range(EPOCHS):
        evaluated = (epoch + 1) % every == 0
        row = {"epoch": str(epoch), "train_box_loss": "0.03", "train_cls_loss": "0.01", "train_obj_loss": str(train[epoch])}
        figures = {"val_box_loss": 0.03, "val_cls_loss": 0.01, "val_obj_loss": val[epoch], "map50": score[epoch] * 1.6, "map50_95": score[epoch]}
        table.append(row | {name: str(value) if evaluated else "" for name, value in figures.items()})
    return table


def falling(end: float, levels_off: float = 0.5) -> np.ndarray:
    """From 0.2 down to ``end``, flat from ``levels_off`` of the run on."""
    return 0.2 + (end - 0.2) * np.minimum(DONE / levels_off, 1)


RISING_AGAIN = np.where(DONE < 0.4, falling(0.1, 0.4), 0.1 + (DONE - 0.4) * 0.08)
SCORE = 0.5 * np.minimum(DONE / 0.5, 1) + 0.01

COURSES = {
    "over-fitting since epoch": rows(falling(0.05, 1), RISING_AGAIN, np.where(DONE < 0.4, SCORE, 0.45 - (DONE - 0.4) * 0.2)),
    "about right": rows(falling(0.09), falling(0.1), SCORE),
    "not finished": rows(falling(0.09, 1), falling(0.1, 1), 0.5 * DONE + 0.01),
    "under-fitting": rows(falling(0.18), falling(0.19), 0.05 * SCORE),
    "diverging": rows(RISING_AGAIN * 2, RISING_AGAIN * 2, SCORE),
}


@pytest.mark.parametrize("finding", COURSES)
def test_what_is_plain_to_see_is_said(finding: str) -> None:
    said = diagnose(COURSES[finding])
    assert said[0].startswith(finding), said
    assert len(said) == 2


def test_over_fitting_says_since_when_by_how_much_and_what_it_cost() -> None:
    text, advice = diagnose(COURSES["over-fitting since epoch"])
    epoch = int(text.split("since epoch ")[1].split(":")[0])
    assert abs(epoch - 0.4 * EPOCHS) <= 4
    assert "mostly that of objectness" in text
    assert "mAP50-95 went from 0.4" in text
    assert "best.pt" in advice


def test_confidences_alone_may_be_over_fitted() -> None:
    said = diagnose(rows(falling(0.05, 1), RISING_AGAIN, SCORE))
    assert said[0].startswith("over-fitting")
    assert "scores did not suffer" in said[1]


def test_few_evaluations_are_enough_but_not_too_few() -> None:
    assert diagnose(rows(falling(0.09), falling(0.1), SCORE, every=5))[0].startswith("about right")
    assert diagnose(rows(falling(0.09), falling(0.1), SCORE, every=10))[0].startswith("too early to tell: 6 epochs")


def test_a_loss_that_is_no_number() -> None:
    table = rows(falling(0.09), falling(0.1), SCORE)
    table[-1]["train_obj_loss"] = "nan"
    assert diagnose(table)[0].startswith("diverged")


def test_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no results\.csv"):
        diagnose_run(tmp_path)
    table = COURSES["about right"]
    with (tmp_path / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0])
        writer.writeheader()
        writer.writerows(table)
    assert diagnose_run(tmp_path) == diagnose(table)
    whole = (tmp_path / "results.csv").read_bytes()
    cut = whole.rstrip().rpartition(b",")[0]  # a disk that was full, or a host without power
    (tmp_path / "results.csv").write_bytes(cut)
    assert diagnose_run(tmp_path) == diagnose(table[:-1])
    for content in (b"", b"\0\xff\xfe" * 9):
        (tmp_path / "results.csv").write_bytes(content)
        with pytest.raises(InputError, match="one that horoyolo wrote is wanted"):
            diagnose_run(tmp_path)


def test_report_alone_is_the_diagnosis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no results.csv" in capsys.readouterr().err
    table = COURSES["about right"]
    (tmp_path / "results.csv").write_text("\n".join(",".join(row) for row in [list(table[0]), *(row.values() for row in table)]))
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "new" / "report.json")]) == 0
    assert capsys.readouterr().out.splitlines() == json.loads((tmp_path / "new" / "report.json").read_text())["diagnosis"] == diagnose(table)


def test_a_results_csv_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("epoch,train/box_loss\n0,0.1\n")
    with pytest.raises(InputError, match=r"no column 'train_obj_loss'"):
        diagnose_run(tmp_path)
