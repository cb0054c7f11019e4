from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.model.anchors import best_possible_recall, closeness, fit_anchors, fitness
from horoyolo.model.loss import match_targets
from horoyolo.model.yolo import build_model

GROUPS = np.array([[12.0, 8.0], [30.0, 60.0], [150.0, 120.0]])


def boxes_around(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return groups[rng.integers(len(groups), size=count)] * np.exp(rng.normal(0, 0.1, (count, 2)))


def test_closeness_by_hand() -> None:
    boxes, anchors = np.array([[10.0, 20.0], [8.0, 8.0]]), np.array([[10.0, 10.0], [2.0, 8.0]])
    assert closeness(boxes, anchors) == pytest.approx([0.5, 0.8])
    assert best_possible_recall(boxes, anchors, 1.9) == 0.5
    assert fitness(boxes, anchors, 1.9) == pytest.approx(0.4)
    assert best_possible_recall(np.zeros((0, 2)), anchors, 4.0) == 1.0


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_recall_is_of_the_boxes_that_the_loss_matches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes, anchors = rng.uniform(2, 200, (30, 2)), rng.uniform(2, 200, (4, 2))
    targets = torch.zeros(30, 6)
    targets[:, 2:4], targets[:, 4:6] = 0.5, torch.from_numpy(boxes / 640)
    targets[:, 0] = torch.arange(30)
    match = match_targets(targets, torch.from_numpy(anchors / 8).float(), (80, 80), 4.0)
    assert best_possible_recall(boxes, anchors, 4.0) == pytest.approx(len(match.image.unique()) / 30)


def test_groups_of_boxes_are_found() -> None:
    fitted = fit_anchors(boxes_around(GROUPS, 600, seed=1), 3, 4.0, generations=200)
    np.testing.assert_allclose(fitted, GROUPS, rtol=0.1)


@given(st.integers(0, 2**31), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_the_search_never_makes_it_worse_and_repeats(seed: int, count: int) -> None:
    boxes = np.random.default_rng(seed).uniform(1, 300, (50, 2))
    before, after = (fit_anchors(boxes, count, 4.0, seed, generations) for generations in (0, 60))
    usable = boxes[(boxes >= 2).any(1)]
    assert fitness(usable, after, 4.0) >= fitness(usable, before, 4.0)
    assert after.shape == (count, 2)
    assert (np.diff(after.prod(1)) >= 0).all()
    assert np.array_equal(after, fit_anchors(boxes, count, 4.0, seed, generations=60))


def test_fewer_boxes_than_anchors() -> None:
    assert np.isfinite(fit_anchors(np.array([[30.0, 40.0], [30.0, 40.0]]), 9, 4.0, generations=10)).all()
    with pytest.raises(ValueError, match="no box"):
        fit_anchors(np.array([[1.0, 1.0]]), 9, 4.0)


def test_a_model_takes_small_anchors_on_its_fine_grid() -> None:
    model = build_model("yolov5n", 3)
    before = model.anchors
    sizes = torch.tensor([[side, side * 1.5] for side in (9, 1, 2, 3, 4, 5, 6, 7, 8)], dtype=torch.float64)
    model.set_anchors(sizes)
    assert model.anchors is before  # in place: the loss holds the same tensor
    assert model.anchors_px[:, :, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
