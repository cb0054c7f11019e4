"""Shapes of training batches: functions of the global batch, multiples of the stride, and rectangles that waste little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.data.sampler import Sampler
from horoyolo.data.shapes import WINDOW, Shapes

ASPECTS = np.random.default_rng(0).choice([0.5, 0.75, 1.0, 1.5], 3 * WINDOW)


@settings(deadline=None)
@given(
    aspects=st.lists(st.floats(0.05, 20), min_size=1, max_size=16),
    number=st.integers(1, 40),
    stride=st.sampled_from([32, 64]),
    multi_scale=st.booleans(),
    position=st.integers(0, 1000),
)
def test_every_image_of_a_batch_fits_into_its_rectangle(aspects: list[float], number: int, stride: int, multi_scale: bool, position: int) -> None:
    shapes = Shapes(number * stride, stride, multi_scale, np.array(aspects))
    hw = shapes.batch_hw(0, 0, position, np.arange(len(aspects)))
    side = max(hw)
    assert all(length % stride == 0 and length > 0 for length in hw)
    assert side <= shapes.largest
    if multi_scale:
        assert number * stride * 0.5 - stride < side <= number * stride * 1.5
    else:
        assert side == number * stride
    for aspect in aspects:  # the long side at the batch's
        height, width = side * min(aspect, 1), side * min(1 / aspect, 1)
        assert height <= hw[0] + 1e-3
        assert width <= hw[1] + 1e-3


def test_sizes_of_multi_scale_change_from_batch_to_batch_and_all_occur() -> None:
    shapes = Shapes(320, 32, multi_scale=True)
    sides = [shapes.batch_hw(0, epoch, position, np.arange(4))[0] for epoch in range(4) for position in range(0, 400, 4)]
    assert set(sides) == set(range(160, 481, 32))
    assert sides[:20] != [shapes.batch_hw(1, 0, position, np.arange(4))[0] for position in range(0, 80, 4)]


@given(count=st.integers(1, 3 * WINDOW), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_arranging_is_a_permutation_within_windows(count: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(count)
    arranged = Shapes(64, 32, aspects=ASPECTS).arrange(order)
    for start in range(0, count, WINDOW):
        assert sorted(arranged[start : start + WINDOW]) == sorted(order[start : start + WINDOW])


def test_neighbours_have_like_aspects_and_images_of_one_shape_keep_their_random_order() -> None:
    shapes = Shapes(64, 32, aspects=ASPECTS)
    order = np.random.default_rng(0).permutation(len(ASPECTS))
    arranged = shapes.arrange(order)
    assert (np.diff(ASPECTS[arranged]) != 0).sum() == 3 * 3  # 4 aspects in each of 3 windows, which meet without a step
    same = Shapes(64, 32, aspects=np.ones(len(ASPECTS)))
    assert np.array_equal(same.arrange(order), order)


@pytest.mark.parametrize("multi_scale", [False, True])
def test_a_run_goes_on_with_another_batch_and_misses_no_image(multi_scale: bool) -> None:
    shapes = Shapes(64, 32, multi_scale, ASPECTS[:100])
    first = Sampler(100, 8, 0, shapes)
    used = [key.index for keys in list(first.batches(0, 1))[:3] for key in keys]
    first.advance(24)
    second = Sampler(100, 5, 0, shapes)
    second.load_state_dict(first.state_dict())
    used += [key.index for keys in second.batches(0, 1) for key in keys]
    assert sorted(used) == list(range(100))
