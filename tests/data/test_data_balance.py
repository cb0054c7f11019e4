"""Weighted sampling: chances by plain loops, draws as even as they can be, the same for all who ask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.data.balance import Balance
from horoyolo.data.sampler import Sampler


def labels_of(images: list[list[int]]) -> list[np.ndarray]:
    return [np.array([[class_id, 0.5, 0.5, 0.1, 0.1] for class_id in classes], np.float32).reshape(-1, 5) for classes in images]


images = st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=30)


@settings(deadline=None)
@given(images=images, by=st.sampled_from(["classes", "images"]), ap=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_weights_agree_with_plain_loops(images: list[list[int]], by: str, ap: list[float]) -> None:
    balance = Balance(labels_of(images), 4, by)
    balance.ap = np.array(ap)
    plain = []
    for classes in images:
        if by == "classes":
            having = {c: sum(c in other for other in images) / len(images) for c in classes}
            plain.append(max((having[c] ** -0.5 for c in classes), default=0.0))
        else:
            boxes = {c: sum(other.count(c) for other in images) for c in classes}
            plain.append(sum(max((1 - ap[c]) ** 2, 0.01) / boxes[c] for c in classes))
    mean = sum(plain) / max(sum(weight > 0 for weight in plain), 1)
    expected = [weight / mean if weight else 1.0 for weight in plain]
    assert np.allclose(balance.weights(), expected)
    assert balance.weights().mean() == pytest.approx(1)


@settings(deadline=None)
@given(images=images, by=st.sampled_from(["classes", "images"]), seed=st.integers(0, 2**32))
def test_each_image_is_drawn_as_often_as_its_weight_says(images: list[list[int]], by: str, seed: int) -> None:
    balance = Balance(labels_of(images), 4, by)
    drawn = balance.draw(np.random.default_rng(seed))
    times = np.bincount(drawn, minlength=len(images))
    assert len(drawn) == len(images)
    assert (np.abs(times - balance.weights()) < 1 + 1e-9).all()


def test_rare_classes_are_seen_more_often() -> None:
    images = [[0]] * 90 + [[0, 1]] * 10
    for by in ("classes", "images"):
        often, rare = Balance(labels_of(images), 2, by).boxes_seen()
        assert rare > 1.9 * often
    found = Balance(labels_of(images), 2, "images")
    found.ap = np.array([0.0, 1.0])  # the rare class is found without fault: it counts less
    assert found.boxes_seen()[1] < Balance(labels_of(images), 2, "images").boxes_seen()[1]


def test_what_was_learned_from_an_evaluation_travels_with_the_state() -> None:
    images = [[0]] * 10 + [[1]] * 10
    first = Sampler(20, 4, 0, balance=Balance(labels_of(images), 2, "images"))
    assert first.balance is not None
    first.balance.ap = np.array([0.9, 0.1])
    second = Sampler(20, 4, 0, balance=Balance(labels_of(images), 2, "images"))
    assert not np.array_equal(first.order(3), second.order(3))
    second.load_state_dict(first.state_dict())
    assert np.array_equal(first.order(3), second.order(3))
    second.load_state_dict({"epoch": 1, "consumed": 4})  # of a run that drew uniformly
    assert (second.epoch, second.consumed) == (1, 4)
