"""Anchors that fit a data set's boxes: how well given ones do, and better ones by k-means and evolution.

Sizes are widths and heights in pixels of the training images. A box can be learned from an anchor where neither side differs from the
anchor's by a factor of ``anchor_t`` or more: the rule by which the loss matches them.
"""

from __future__ import annotations

import numpy as np

GENERATIONS = 1000
MOST_BOXES = 20000  # that the search looks at: more tell it nothing new
KMEANS_ROUNDS = 50
SMALLEST_SIDE_PX = 2.0  # boxes with both sides below are learned by nobody


def closeness(boxes_wh: np.ndarray, anchors_wh: np.ndarray) -> np.ndarray:
    """How near each box (n, 2) is to its best anchor (k, 2): (n,), 1 for the same size, 1/4 where a side differs by a factor of 4."""
    width, height = np.log(boxes_wh).T  # (n,) each: in logarithms a factor is a distance, either way
    distance = np.full(len(boxes_wh), np.inf)
    for anchor_width, anchor_height in np.log(anchors_wh):  # one at a time, within the cache
        np.minimum(distance, np.maximum(np.abs(width - anchor_width), np.abs(height - anchor_height)), out=distance)
    return np.exp(-distance)


def best_possible_recall(boxes_wh: np.ndarray, anchors_wh: np.ndarray, anchor_t: float) -> float:
    """The part of the boxes (n, 2) that any of the anchors (k, 2) can learn; 1 without boxes."""
    return float((closeness(boxes_wh, anchors_wh) > 1 / anchor_t).mean()) if len(boxes_wh) else 1.0


def fitness(boxes_wh: np.ndarray, anchors_wh: np.ndarray, anchor_t: float) -> float:
    """What the search makes large: the mean closeness of boxes, those that no anchor can learn counted as 0."""
    close = closeness(boxes_wh, anchors_wh)
    return float(np.where(close > 1 / anchor_t, close, 0).mean())


def fit_anchors(boxes_wh: np.ndarray, count: int, anchor_t: float, seed: int = 0, generations: int = GENERATIONS) -> np.ndarray:
    """``count`` anchors (count, 2) by rising area for boxes (n, 2): k-means, then random changes of which each that helps is kept.

    The same boxes and seed give the same anchors. Raises ValueError without any box of a usable size.
    """
    rng = np.random.default_rng(seed)
    boxes_wh = usable(boxes_wh).astype(np.float64)
    if not len(boxes_wh):
        raise ValueError(f"no box has a side of {SMALLEST_SIDE_PX:g} px")
    if len(boxes_wh) > MOST_BOXES:
        boxes_wh = rng.choice(boxes_wh, MOST_BOXES, replace=False)
    anchors = np.exp(_kmeans(np.log(boxes_wh), count, rng))  # in logarithms too
    best = fitness(boxes_wh, anchors, anchor_t)
    for _ in range(generations):
        step = np.exp(rng.normal(0, 0.1, anchors.shape) * (rng.random(anchors.shape) < 0.5))
        changed = np.maximum(anchors * step, SMALLEST_SIDE_PX)
        value = fitness(boxes_wh, changed, anchor_t)
        if value > best:
            anchors, best = changed, value
    return anchors[np.argsort(anchors.prod(1), kind="stable")]


def usable(boxes_wh: np.ndarray) -> np.ndarray:
    """The boxes (n, 2) that are large enough to count and have an area."""
    return boxes_wh[(boxes_wh >= SMALLEST_SIDE_PX).any(1) & (boxes_wh > 0).all(1)]


def _kmeans(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (count, d) of points (n, d): Lloyd's rounds from seeds far apart (Arthur & Vassilvitskii 2007, k-means++)."""
    centres = points[[rng.integers(len(points))]]
    while len(centres) < count:
        distance2 = _distances2(points, centres).min(1)
        total = distance2.sum()
        chance = distance2 / total if total > 0 else None  # all points on centres already: any will do
        centres = np.concatenate([centres, points[[rng.choice(len(points), p=chance)]]])
    for _ in range(KMEANS_ROUNDS):
        nearest = _distances2(points, centres).argmin(1)
        moved = np.array([points[nearest == i].mean(0) if (nearest == i).any() else centre for i, centre in enumerate(centres)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _distances2(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres[None]) ** 2).sum(2)
