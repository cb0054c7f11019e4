"""YOLO label files: where they lie and what a line of one may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4  # rounding of a label's writer: coordinates this far outside [0, 1] are clipped, not refused


@dataclass(frozen=True)
class LineProblem:
    """A label line that isn't used as it stands."""

    kind: str  # corrupt, out_of_range, zero_area, duplicate
    line: int  # from 1
    reason: str


def label_path(image: Path) -> Path:
    """The label file of an image: its last `images` folder becomes `labels`, its suffix `.txt`; with no such folder, beside it."""
    parts = list(image.parts)
    for at in range(len(parts) - 2, -1, -1):
        if parts[at] == "images":
            parts[at] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def parse_labels(text: str) -> tuple[np.ndarray, np.ndarray, list[LineProblem]]:
    """Read a label file: lines of `class x y w h`, or `class x1 y1 x2 y2 x3 y3 ...` (a polygon: its bounding box is taken), normalised.

    Returns labels (n, 5) float32 class and box_xywhn, the line number of each (n,), and the lines dropped with the reason.
    """
    labels: list[tuple[float, ...]] = []
    lines: list[int] = []
    problems: list[LineProblem] = []
    seen: set[tuple[float, ...]] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        label = _parse_line(line)
        if isinstance(label, tuple):
            if label not in seen:
                seen.add(label)
                labels.append(label)
                lines.append(number)
                continue
            label = LineProblem("duplicate", 0, "the same as an earlier line")
        problems.append(replace(label, line=number))
    return np.array(labels, np.float32).reshape(-1, 5), np.array(lines, np.int64), problems


def parse_outlines(text: str, lines: np.ndarray) -> list[np.ndarray]:
    """The outline (k, 2) of the label on each of these lines (from 1), normalised x and y; (0, 2) for one that is a box."""
    rows = text.splitlines()
    found = [np.array(rows[line - 1].split()[1:], np.float32).reshape(-1, 2).clip(0, 1) for line in lines]
    return [outline if len(outline) > 2 else outline[:0] for outline in found]


def _parse_line(line: str) -> tuple[float, ...] | LineProblem:
    try:
        class_id, *coordinates = (float(field) for field in line.split())
    except ValueError:
        return LineProblem("corrupt", 0, "not a number")
    num_fields = 1 + len(coordinates)
    if num_fields < 5 or num_fields % 2 == 0:
        return LineProblem("corrupt", 0, f"{num_fields} fields; 5 for a box, or a class and at least 3 points")
    if not all(math.isfinite(value) for value in (class_id, *coordinates)):
        return LineProblem("corrupt", 0, "not finite")
    if class_id < 0 or class_id != int(class_id):
        return LineProblem("corrupt", 0, f"class {class_id:g}; classes are 0, 1, 2, ...")
    # As in YOLOv5 points of a polygon may lie outside, as long as its box is one that a label may have.
    box = coordinates if num_fields == 5 else _around(coordinates)
    if min(box) < -TOLERANCE or max(box) > 1 + TOLERANCE:
        return LineProblem("out_of_range", 0, "coordinates must lie between 0 and 1")
    coordinates = [min(max(value, 0.0), 1.0) for value in coordinates]
    if num_fields > 5:
        coordinates = _around(coordinates)
    if coordinates[2] <= 0 or coordinates[3] <= 0:
        return LineProblem("zero_area", 0, "a box without area")
    return (class_id, *coordinates)


def _around(points: list[float]) -> list[float]:
    """The box_xywhn around points x1 y1 x2 y2 ..."""
    xs, ys = points[0::2], points[1::2]
    return [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
