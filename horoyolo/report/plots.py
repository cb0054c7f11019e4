"""Pictures of a run: curves over its epochs, and batches as the model sees them.

They are extras: what goes wrong with one is logged, never raised.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from torch import Tensor

from horoyolo.files import atomic_file
from horoyolo.report.draw import draw_boxes

if TYPE_CHECKING:  # imported where it is used, for it takes half a second: see new_figure
    from matplotlib.figure import Figure

log = logging.getLogger("horoyolo")

LOSSES = {"box": "Boxes", "obj": "Objectness", "cls": "Classes"}
METRICS = {"map50": "mAP at IoU 0.5", "map50_95": "mAP at IoU 0.5 to 0.95", "precision": "Precision", "recall": "Recall"}
FEW_POINTS = 60  # up to here each epoch is marked, which also shows a curve of one point

MAX_NAMES = 30  # of classes below a plot
MAX_TILES = 16
MAX_SIDE = 1920  # pixels
WHITE = 255

Columns = dict[str, np.ndarray]  # each (epochs,), NaN where nothing was measured


def plot_curves(results_csv: Path, folder: Path) -> None:
    """Draws ``losses.png``, ``map.png`` and ``lr.png`` into ``folder`` from the rows that are there; nothing while there are none."""
    with _as_an_extra(f"curves of {results_csv}"):
        columns = _read_columns(results_csv)
        if columns:
            folder.mkdir(parents=True, exist_ok=True)
            _save(_loss_figure(columns), folder / "losses.png")
            _save(_metric_figure(columns), folder / "map.png")
            _save(_rate_figure(columns), folder / "lr.png")


def plot_batch(images: Tensor, targets: Tensor, names: Mapping[int, str], path: Path) -> None:
    """Draws up to 16 images (B, 3, H, W), uint8 RGB, side by side with their targets (M, 6): image index, class, box_xywhn."""
    with _as_an_extra(f"batch in {path}"):
        if not len(images):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = batch_grid(images, targets, names)
        ok, png = cv2.imencode(".png", cv2.cvtColor(grid, cv2.COLOR_RGB2BGR))
        assert ok
        with atomic_file(path) as stream:
            stream.write(png)


def plot_boxes(
    boxes_of_class: Mapping[str, int], images_of_class: Mapping[str, int], boxes_wh: np.ndarray, anchors_wh: np.ndarray, path: Path
) -> None:
    """Draws classes by boxes and by images, and the sizes (n, 2) of boxes in pixels beside those of anchors (k, 2), into one picture."""
    with _as_an_extra(f"boxes in {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = new_figure(15, 4.5)
        classes, sizes, aspects = figure.subplots(1, 3)
        at = np.arange(len(boxes_of_class))
        classes.bar(at - 0.2, list(boxes_of_class.values()), 0.4, label="boxes")
        classes.bar(at + 0.2, list(images_of_class.values()), 0.4, label="images")
        if len(at) <= MAX_NAMES:
            classes.set_xticks(at, list(boxes_of_class), rotation=30, ha="right", parse_math=False)
        classes.set(title="Classes", yscale="log" if len(at) > MAX_NAMES else "linear")
        classes.legend()
        sizes.plot(boxes_wh[:, 0], boxes_wh[:, 1], ".", markersize=2, alpha=0.4, label="boxes")
        sizes.plot(anchors_wh[:, 0], anchors_wh[:, 1], "x", color="black", label="anchors")
        sizes.set(title="Sizes in training images", xlabel="width, px", ylabel="height, px", xscale="log", yscale="log")
        sizes.legend()
        aspects.hist(np.log2(boxes_wh[:, 0] / boxes_wh[:, 1]), bins=60)
        aspects.set(title="Aspect ratios", xlabel="log2(width / height)", ylabel="boxes")
        for axes in (sizes, aspects):
            axes.grid(alpha=0.3)
        _save(figure, path)


def batch_grid(images: Tensor, targets: Tensor, names: Mapping[int, str]) -> np.ndarray:
    """The picture that `plot_batch` saves, (height, width, 3) uint8 RGB, at most 1920 pixels a side."""
    count = min(len(images), MAX_TILES)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = 2
    whole_h, whole_w = images.shape[2:]
    shrink = min((MAX_SIDE // max(columns, rows) - gap) / max(whole_h, whole_w), 1)
    height, width = round(whole_h * shrink), round(whole_w * shrink)
    grid = np.full((rows * (height + gap), columns * (width + gap), 3), WHITE, np.uint8)
    for i in range(count):
        pixels = images[i].permute(1, 2, 0).contiguous().cpu().numpy()  # (H, W, 3)
        if shrink < 1:
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        own = targets[targets[:, 0] == i].cpu().numpy()  # (m, 6)
        classes = own[:, 1].astype(int).tolist()
        centre, half = own[:, 2:4] * (width, height), own[:, 4:6] * (width / 2, height / 2)
        captions = [names.get(class_id, str(class_id)) for class_id in classes]
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        grid[y : y + height, x : x + width] = draw_boxes(pixels, np.hstack((centre - half, centre + half)), classes, captions)
    return grid[: -gap or None, : -gap or None]


@contextmanager
def _as_an_extra(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk or an odd font must not end hours of training
        log.warning("no picture of the %s: %s: %s", what, type(error).__name__, error)


def _read_columns(path: Path) -> Columns:
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: np.array([_number(row[name]) for row in rows]) for name in rows[0]} if rows else {}


def _number(text: str | None) -> float:
    return float(text) if text else math.nan  # empty: not measured in this epoch


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; imports matplotlib."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _loss_figure(columns: Columns) -> Figure:
    figure = new_figure(12, 4)
    for axes, (part, title) in zip(figure.subplots(1, len(LOSSES)), LOSSES.items(), strict=True):
        _draw_curve(axes, columns, f"train_{part}_loss", "training")
        _draw_curve(axes, columns, f"val_{part}_loss", "validation")
        _label(axes, title, "loss per image")
    return figure


def _metric_figure(columns: Columns) -> Figure:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for name, label in METRICS.items():
        _draw_curve(axes, columns, name, label)
    axes.set_ylim(0, 1)
    _label(axes, "Validation", "score")
    return figure


def _rate_figure(columns: Columns) -> Figure:
    figure = new_figure(8, 4)
    axes = figure.subplots()
    _draw_curve(axes, columns, "lr", "")
    axes.set_ylim(bottom=0)
    _label(axes, "Learning rate at the end of each epoch", "learning rate")
    return figure


def _draw_curve(axes, columns: Columns, name: str, label: str) -> None:
    measured = np.isfinite(columns[name])
    if measured.any():
        style = ".-" if measured.sum() <= FEW_POINTS else "-"
        axes.plot(columns["epoch"][measured], columns[name][measured], style, label=label, linewidth=1.5)


def _label(axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(framealpha=0.9)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
