"""What a run's losses and scores say, in words: over-fitting, under-fitting, unfinished, or about right.

Training losses are of augmented images and of the weights as they move, validation losses of plain images and of the average: their levels can't
be compared, so what counts is which way each goes. Single epochs are noise; all figures are means over a few.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from horoyolo.config import InputError

PARTS = {"box": "boxes", "obj": "objectness", "cls": "classes"}
FEWEST_EPOCHS = 10  # evaluated ones
RISEN, FALLEN = 0.05, 0.02  # parts of a loss by which it must rise or fall to be told from noise
SCORE_STEP = 0.01  # of mAP50-95, likewise
LOW_SCORE = 0.3  # mAP50 of a model that has hardly learned


@dataclass(frozen=True)
class Course:
    """The evaluated epochs of a run, smoothed; each (n,)."""

    epoch: np.ndarray
    train: dict[str, np.ndarray]  # by part
    val: dict[str, np.ndarray]
    map50: np.ndarray
    map50_95: np.ndarray

    @property
    def train_loss(self) -> np.ndarray:
        """Of all parts."""
        return sum(self.train.values(), np.zeros(len(self.epoch)))

    @property
    def val_loss(self) -> np.ndarray:
        """Of all parts."""
        return sum(self.val.values(), np.zeros(len(self.epoch)))


def diagnose_run(folder: Path) -> list[str]:
    """The diagnosis of a run folder's results.csv; a row that was cut short is left out (InputError: there is none that horoyolo wrote)."""
    try:
        with (folder / "results.csv").open(newline="", errors="replace") as stream:
            reader = csv.DictReader(stream)
            if "train_obj_loss" not in (reader.fieldnames or []):
                raise KeyError("train_obj_loss")
            return diagnose([row for row in reader if None not in row.values()])
    except ValueError as error:
        raise InputError(f"{folder / 'results.csv'}: {error}; one that horoyolo wrote is wanted") from None
    except OSError as error:
        raise InputError(f"{folder}: no results.csv of a run there ({error.strerror})") from None
    except KeyError as error:
        raise InputError(f"{folder / 'results.csv'}: it has no column {error}; one that horoyolo wrote is wanted") from None


def diagnose(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """What the rows of a results.csv say, a line each: the finding first, then what to do about it."""
    if any(row["train_obj_loss"] in ("nan", "inf", "-inf") for row in rows):
        return ["diverged: the training loss is no number any more", "try a lower hyp.lr0, a longer hyp.warmup_epochs or --precision fp32"]
    evaluated = [row for row in rows if row["val_obj_loss"]]
    if len(evaluated) < FEWEST_EPOCHS:
        return [f"too early to tell: {len(evaluated)} epochs were evaluated, {FEWEST_EPOCHS} are wanted"]
    course = _course(evaluated)
    return _diverged(course) or _over_fitted(course) or _unfinished(course) or _under_fitted(course) or _about_right(course)


def _diverged(course: Course) -> list[str]:
    loss = course.train_loss
    lowest = int(loss.argmin())
    if _change(loss, lowest) < 4 * RISEN:
        return []
    where = f"from {loss[lowest]:.4f} in epoch {course.epoch[lowest] + 1} to {loss[-1]:.4f}"
    return [f"diverging: the training loss rose {where}", "try a lower hyp.lr0 or a longer hyp.warmup_epochs"]


def _over_fitted(course: Course) -> list[str]:
    lowest = int(course.val_loss.argmin())
    risen, fallen = _change(course.val_loss, lowest), -_change(course.train_loss, lowest)
    if risen < RISEN or fallen < FALLEN:
        return []
    rises = {PARTS[part]: loss[-1] - loss[lowest] for part, loss in course.val.items()}
    worst = max(rises, key=rises.__getitem__)
    since = course.epoch[lowest] + 1
    losses = f"the validation loss rose by {risen:.0%}, mostly that of {worst}, the training loss fell by {fallen:.0%}"
    finding = f"over-fitting since epoch {since}: {losses}"
    best = int(course.map50_95.argmax())
    if course.map50_95[best] - course.map50_95[-1] < SCORE_STEP:
        return [finding, "scores did not suffer: confidences are off, boxes are not; there is nothing to gain from longer training of this kind"]
    lost = f"mAP50-95 went from {course.map50_95[best]:.3f} around epoch {course.epoch[best] + 1} to {course.map50_95[-1]:.3f}"
    advice = "use best.pt; next time fewer epochs or a smaller --patience, more images, more augmentation (--hyp med or high) or a smaller model"
    return [f"{finding}; {lost}", advice]


def _unfinished(course: Course) -> list[str]:
    quarter = len(course.epoch) * 3 // 4
    gained, fallen = course.map50_95[-1] - course.map50_95[quarter], -_change(course.val_loss, quarter)
    if gained < SCORE_STEP or fallen < 0:
        return []
    score = f"mAP50-95 rose by {gained:.3f}, to {course.map50_95[-1]:.3f}"
    return [
        f"not finished: since epoch {course.epoch[quarter] + 1} {score}, and the validation loss fell by {fallen:.0%}",
        "more --epochs would score higher, or --weights to start from",
    ]


def _under_fitted(course: Course) -> list[str]:
    if course.map50.max() >= LOW_SCORE:
        return []
    half = len(course.epoch) // 2
    fallen = -_change(course.train_loss, half)
    return [
        f"under-fitting: mAP50 is no more than {course.map50.max():.3f}, and the training loss fell by only {fallen:.0%} in the last half",
        "try --weights to start from, a larger model or --img, less augmentation (--hyp low), and look at labels with horoyolo data check",
    ]


def _about_right(course: Course) -> list[str]:
    best = int(course.map50_95.argmax())
    levelled = f"training and validation loss have levelled off together; mAP50-95 {course.map50_95[best]:.3f} around epoch {course.epoch[best] + 1}"
    return [f"about right: {levelled}", "to score higher take a larger model, a larger --img or more images, rather than more epochs"]


def _change(values: np.ndarray, since: int) -> float:
    """By which part the last value is above that at ``since``."""
    return float(values[-1] / max(values[since], 1e-12) - 1)


def _course(rows: Sequence[Mapping[str, str]]) -> Course:
    def column(name: str) -> np.ndarray:
        return _smoothed(np.array([float(row[name]) for row in rows]))

    return Course(
        epoch=np.array([int(row["epoch"]) for row in rows]),
        train={part: column(f"train_{part}_loss") for part in PARTS},
        val={part: column(f"val_{part}_loss") for part in PARTS},
        map50=column("map50"),
        map50_95=column("map50_95"),
    )


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a tenth of the epochs, three at least, and fewer at the ends."""
    reach = max(len(values) // 20, 1)
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])
