"""Augmentation: boxes go where the pixels go, inputs stay, the same generator gives the same result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.data.augment import (
    GREY,
    Geometry,
    Tile,
    box_candidates,
    flip_lr,
    flip_ud,
    hsv,
    letterbox,
    mixup,
    mosaic,
    random_perspective,
    warp_boxes,
)

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)


def tile(colour: np.ndarray, hw: tuple[int, int], box: tuple[int, int, int, int], class_id: int = 0) -> Tile:
    """A black image with one filled box."""
    image = np.zeros((*hw, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = colour
    return Tile(hw, np.array([[class_id, *box]], np.float32), lambda: image)


def extent(mask: np.ndarray) -> np.ndarray:
    """box_xyxy of the pixels set."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


geometries = st.builds(
    Geometry,
    degrees=st.sampled_from([0.0, 30.0]),
    translate=st.sampled_from([0.0, 0.2]),
    scale=st.sampled_from([0.0, 0.5]),
    shear=st.sampled_from([0.0, 10.0]),
    perspective=st.sampled_from([0.0, 0.0005]),
)


@settings(max_examples=60, deadline=None)
@given(geometry=geometries, seed=st.integers(0, 2**32))
def test_mosaic_boxes_enclose_their_pixels(geometry: Geometry, seed: int) -> None:
    size = 128
    shapes = [(96, 128), (128, 80), (128, 128), (64, 128)]
    tiles = [tile(colour, hw, (20, 20, 60, 50), i) for i, (colour, hw) in enumerate(zip(COLOURS, shapes, strict=True))]
    image, boxes = mosaic(tiles, size, np.random.default_rng(seed), geometry)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert boxes.dtype == np.float32
    assert len(np.unique(boxes[:, 0])) == len(boxes)
    for class_id, *box_xyxy in boxes:
        strong = (np.abs(image.astype(int) - COLOURS[int(class_id)]) < 60).all(axis=2)
        if strong.sum() < 9:
            continue
        found = extent(strong)
        assert (found[:2] >= np.array(box_xyxy[:2]) - 1.5).all()
        assert (found[2:] <= np.array(box_xyxy[2:]) + 1.5).all()
        if geometry.degrees == geometry.shear == geometry.perspective == 0:  # then boxes stay rectangles
            assert np.abs(found - box_xyxy).max() <= 1.5


@settings(max_examples=30, deadline=None)
@given(degrees=st.sampled_from([0.0, 45.0]), perspective=st.sampled_from([0.0, 0.0005]), seed=st.integers(0, 2**32))
def test_tiles_meet_without_a_gap(degrees: float, perspective: float, seed: int) -> None:
    size = 64
    white = np.full((2 * size, 2 * size, 3), 255, np.uint8)  # large enough to leave no background
    tiles = [Tile((2 * size, 2 * size), np.zeros((0, 5), np.float32), lambda: white)] * 4
    image, _ = mosaic(tiles, size, np.random.default_rng(seed), Geometry(degrees=degrees, perspective=perspective))
    # Where four tiles meet in one pixel each may cover a quarter of it: 0.75^4 of the grey is left at most.
    assert image.min() >= 255 - 0.75**4 * (255 - GREY) - 1


def test_a_tile_that_is_not_seen_is_not_decoded() -> None:
    size = 64
    white = np.full((size, size, 3), 255, np.uint8)
    numbers = []
    for seed in range(40):
        decoded: list[int] = []
        loads = [lambda i=i, seen=decoded: (seen.append(i), white)[1] for i in range(4)]
        tiles = [Tile((size, size), np.zeros((0, 5), np.float32), load) for load in loads]
        mosaic(tiles, size, np.random.default_rng(seed), Geometry(translate=0.2, scale=0.5))
        assert len(decoded) == len(set(decoded))
        numbers.append(len(decoded))
    assert {2, 4} <= set(numbers)


def test_mosaic_shows_the_middle_of_the_canvas() -> None:
    size = 64
    grey_levels = [10, 80, 160, 240]
    images = [np.full((size, size, 3), level, np.uint8) for level in grey_levels]
    tiles = [Tile((size, size), np.zeros((0, 5), np.float32), lambda image=image: image) for image in images]
    rng = np.random.default_rng(3)
    centre_x, centre_y = np.random.default_rng(3).integers(size // 2, size * 3 // 2, size=2, endpoint=True)
    image, _ = mosaic(tiles, size, rng, Geometry())
    x, y = centre_x - size // 2, centre_y - size // 2  # the centre in the output
    expected = np.empty((size, size), np.uint8)
    expected[:y, :x], expected[:y, x:], expected[y:, :x], expected[y:, x:] = grey_levels
    assert np.array_equal(image[..., 0], expected)


def test_unreadable_tile_is_grey_and_has_no_boxes() -> None:
    tiles = [Tile((32, 32), np.array([[0, 4, 4, 28, 28]], np.float32), lambda: None)] * 4
    image, boxes = mosaic(tiles, 32, np.random.default_rng(0), Geometry(scale=0.5))
    assert (image == GREY).all()
    assert boxes.shape == (0, 5)


def test_random_perspective_without_ranges_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    boxes = np.array([[1, 3, 4, 30, 20]], np.float32)
    out, new_boxes = random_perspective(image, boxes, rng, Geometry())
    assert np.array_equal(out, image)
    assert np.allclose(new_boxes, boxes)


def test_box_filter() -> None:
    before = np.array([[0, 0, 100, 100]] * 4, float)
    after = np.array([[0, 0, 2, 90], [0, 0, 31, 32], [0, 0, 33, 33], [0, 0, 400, 3]], float)
    assert box_candidates(before, after).tolist() == [False, False, True, False]


def test_warped_boxes_are_clipped_and_dropped_when_mostly_outside() -> None:
    boxes = np.array([[0, 10, 10, 30, 30], [1, 95, 10, 115, 30], [2, 98.5, 10, 118.5, 30]], np.float32)
    kept = warp_boxes(boxes, np.eye(3), 1.0, (100, 100))
    assert kept.tolist() == [[0, 10, 10, 30, 30], [1, 95, 10, 100, 30]]


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.sampled_from([(64, 64), (96, 64), (32, 320)]))
def test_letterbox_maps_the_image_by_gain_and_pad(height: int, width: int, size: tuple[int, int]) -> None:
    out, gain, pad = letterbox(np.zeros((height, width, 3), np.uint8), size)
    assert out.shape == (*size, 3)
    found = extent(out[..., 0] == 0)
    expected = np.array([0, 0, width, height]) * gain + np.array(pad * 2)
    assert np.abs(found - expected).max() <= max(0.5, 1 - gain * min(height, width)) + 1e-6
    assert (out[out != 0] == GREY).all()
    margins = np.array([found[0], found[1], size[1] - found[2], size[0] - found[3]])
    assert abs(margins[0] - margins[2]) <= 1
    assert abs(margins[1] - margins[3]) <= 1


def test_letterbox_agrees_with_the_reference(shared) -> None:
    from horoyolo.data.decode import decode_image

    for name in ("bus", "zidane"):
        expected = np.load(shared / "golden" / f"detect_{name}.npz")["letterboxed_rgb_chw"].transpose(1, 2, 0)
        out, _, _ = letterbox(decode_image(shared / "data" / "images" / f"{name}.jpg"), expected.shape[:2])
        assert np.abs(out.astype(int) - expected).max() <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_flipping_twice_gives_the_original(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (21, 34, 3), dtype=np.uint8)
    boxes = np.array([[2, 3, 5, 30, 20], [1, 0, 0, 34, 21]], np.float32)
    for flip in (flip_lr, flip_ud):
        once = flip(image, boxes, rng, 1.0)
        assert not np.array_equal(once[0], image)
        twice = flip(*once, rng, 1.0)
        assert np.array_equal(twice[0], image)
        assert np.array_equal(twice[1], boxes)
        never = flip(image, boxes, rng, 0.0)
        assert np.array_equal(never[0], image)


def test_flip_moves_boxes_with_pixels() -> None:
    source = tile(COLOURS[0], (30, 40), (5, 8, 15, 12))
    image, boxes = flip_lr(source.load(), source.boxes, np.random.default_rng(0), 1.0)
    assert np.array_equal(extent(image[..., 0] > 0), boxes[0, 1:])
    image, boxes = flip_ud(image, boxes, np.random.default_rng(0), 1.0)
    assert np.array_equal(extent(image[..., 0] > 0), boxes[0, 1:])


def test_hsv_changes_value_by_its_gain() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    gain = 1 + 0.4 * np.random.default_rng(5).uniform(-1, 1, 3)[2]
    out, _ = hsv(image, np.zeros((0, 5), np.float32), np.random.default_rng(5), 0.0, 0.0, 0.4)
    assert np.unique(out).tolist() == [int(100 * gain)]


def test_mixup_keeps_the_boxes_of_both() -> None:
    first = (np.full((8, 8, 3), 200, np.uint8), np.array([[0, 1, 1, 5, 5]], np.float32))
    second = (np.zeros((8, 8, 3), np.uint8), np.array([[1, 2, 2, 6, 6]], np.float32))
    image, boxes = mixup(first, second, np.random.default_rng(0))
    assert boxes[:, 0].tolist() == [0, 1]
    assert 40 < image[0, 0, 0] < 160


@pytest.mark.parametrize("name", ["hsv", "flip_lr", "flip_ud", "random_perspective", "letterbox", "mixup"])
def test_inputs_are_never_changed(name: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    boxes = np.array([[0, 3, 4, 20, 25]], np.float32)
    image_before, boxes_before = image.copy(), boxes.copy()
    {
        "hsv": lambda: hsv(image, boxes, rng, 0.1, 0.5, 0.5),
        "flip_lr": lambda: flip_lr(image, boxes, rng, 1.0),
        "flip_ud": lambda: flip_ud(image, boxes, rng, 1.0),
        "random_perspective": lambda: random_perspective(image, boxes, rng, Geometry(30, 0.1, 0.5, 5, 0.001)),
        "letterbox": lambda: letterbox(image, (64, 48)),
        "mixup": lambda: mixup((image, boxes), (image[::-1], boxes), rng),
    }[name]()
    assert np.array_equal(image, image_before)
    assert np.array_equal(boxes, boxes_before)
