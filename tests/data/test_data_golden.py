"""Augmentations against plain, slow references: loops over pixels and boxes, written for these tests; and laws that hold for any input."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.data.augment import (
    GREY,
    Geometry,
    Labelled,
    Tile,
    choose_pastes,
    flip_lr,
    flip_ud,
    hsv,
    letterbox,
    mixup,
    mosaic,
    random_matrix,
    random_perspective,
    warp_boxes,
    warp_canvas,
)

SIZE = 24
GEOMETRIES = {
    "nothing": Geometry(),
    "usual": Geometry(translate=0.1, scale=0.5),
    "turned": Geometry(degrees=30, shear=10, scale=0.2, translate=0.1),
    "perspective": Geometry(perspective=0.002, degrees=5),
}
seeds = st.integers(0, 2**32)


def smooth(seed: int, hw: tuple[int, int]) -> np.ndarray:
    """An image without sharp edges: a pixel's 32nd part, to which OpenCV rounds places, changes it little."""
    y, x = np.mgrid[: hw[0], : hw[1]].astype(float)
    phases = np.random.default_rng(seed).uniform(0, 6, (3, 2))
    return np.stack([120 + 60 * np.sin(x / 5 + a) + 60 * np.cos(y / 6 + b) for a, b in phases], axis=2).astype(np.uint8)


def random_boxes(seed: int, hw: tuple[int, int], count: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, y = (np.sort(rng.uniform(0, side, (count, 2)), axis=1) for side in hw[::-1])
    return np.column_stack([rng.integers(0, 3, count), x[:, 0], y[:, 0], x[:, 1], y[:, 1]]).astype(np.float32)


def slow_sample(image: np.ndarray, x: float, y: float) -> np.ndarray | None:
    """Bilinear interpolation at a place in pixels, whose centres lie at halves; none beyond the outermost centres."""
    x, y = x - 0.5, y - 0.5
    height, width = image.shape[:2]
    if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
        return None
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    right_part, bottom_part = x - left, y - top
    upper = image[top, left] * (1 - right_part) + image[top, left + 1] * right_part
    lower = image[top + 1, left] * (1 - right_part) + image[top + 1, left + 1] * right_part
    return upper * (1 - bottom_part) + lower * bottom_part


def slow_warp(placed: list[tuple[np.ndarray, tuple[int, int]]], matrix: np.ndarray, hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Each output pixel looked up in the tile it comes from; with it, which pixels lie well inside a tile (or well outside all)."""
    inverse = np.linalg.inv(matrix)
    out = np.full((*hw, 3), GREY, float)
    sure = np.ones(hw, bool)
    for row in range(hw[0]):
        for column in range(hw[1]):
            x, y, z = inverse @ (column + 0.5, row + 0.5, 1)
            for image, (left, top) in placed:
                height, width = image.shape[:2]
                u, v = x / z - left, y / z - top
                value = slow_sample(image, u, v)
                if value is not None:
                    out[row, column] = value
                near_x, near_y = min(abs(u), abs(u - width)) < 1, min(abs(v), abs(v - height)) < 1
                if (near_x and -1 < v < height + 1) or (near_y and -1 < u < width + 1):
                    sure[row, column] = False  # an edge: how pixels are blended there is the library's
    return out, sure


def slow_boxes(boxes: np.ndarray, matrix: np.ndarray, gain: float, hw: tuple[int, int]) -> list[list[float]]:
    kept = []
    for class_id, x1, y1, x2, y2 in boxes.tolist():
        xs, ys = [], []
        for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2)):
            u, v, w = matrix @ (x, y, 1)
            xs.append(u / w)
            ys.append(v / w)
        left, right = (min(max(value, 0), hw[1]) for value in (min(xs), max(xs)))
        top, bottom = (min(max(value, 0), hw[0]) for value in (min(ys), max(ys)))
        width, height = right - left, bottom - top
        if width <= 2 or height <= 2 or max(width / height, height / width) >= 100:
            continue
        if width * height / (gain * (x2 - x1) * gain * (y2 - y1) + 1e-16) > 0.1:
            kept.append([class_id, left, top, right, bottom])
    return kept


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_where_a_point_goes(geometry: Geometry) -> None:
    """From the canvas' middle: perspective, then turned and scaled, then sheared, then put near the output's middle."""
    canvas, hw, zoom = (40, 60), (30, 48), 0.8
    matrix, gain = random_matrix(canvas, hw, np.random.default_rng(9), geometry, zoom)
    rng = np.random.default_rng(9)
    px, py = rng.uniform(-geometry.perspective, geometry.perspective, 2)
    angle = math.radians(rng.uniform(-geometry.degrees, geometry.degrees))
    scale = rng.uniform(1 - geometry.scale, 1 + geometry.scale) * zoom
    shear_x, shear_y = (math.tan(math.radians(value)) for value in rng.uniform(-geometry.shear, geometry.shear, 2))
    to_x, to_y = rng.uniform(0.5 - geometry.translate, 0.5 + geometry.translate, 2)
    assert gain == pytest.approx(scale)
    for x, y in ((0, 0), (60, 40), (13, 31)):
        u, v = x - 30, y - 20
        w = px * u + py * v + 1
        u, v = scale * (math.cos(angle) * u + math.sin(angle) * v), scale * (math.cos(angle) * v - math.sin(angle) * u)
        u, v = u + shear_x * v, v + shear_y * u
        expected = u / w + 48 * to_x, v / w + 30 * to_y
        found = matrix @ (x, y, 1)
        assert (found[:2] / found[2]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("hw", "zoom"), [((SIZE, SIZE), 1.0), ((16, SIZE), 1.0), ((36, 36), 1.5)])
def test_a_warped_image_and_its_boxes(geometry: Geometry, hw: tuple[int, int], zoom: float) -> None:
    canvas = (round(hw[0] / zoom), round(hw[1] / zoom))
    image, boxes = smooth(1, canvas), random_boxes(2, canvas)
    out, found = warp_canvas([(Tile(canvas, boxes, lambda: image), (0, 0))], canvas, hw, np.random.default_rng(3), geometry, zoom)
    matrix, gain = random_matrix(canvas, hw, np.random.default_rng(3), geometry, zoom)
    expected, sure = slow_warp([(image, (0, 0))], matrix, hw)
    assert sure.mean() > 0.5
    assert np.abs(out - expected)[sure].max() <= 4
    assert np.allclose(found, np.array(slow_boxes(boxes, matrix, gain, hw)).reshape(-1, 5), atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_mosaic(geometry: Geometry) -> None:
    shapes = [(SIZE, SIZE), (SIZE, 18), (16, SIZE), (SIZE, 20)]
    images = [smooth(number, hw) for number, hw in enumerate(shapes)]
    tiles = [Tile(hw, random_boxes(number, hw), lambda image=image: image) for number, (hw, image) in enumerate(zip(shapes, images, strict=True))]
    out, found = mosaic(tiles, SIZE, np.random.default_rng(5), geometry)

    rng = np.random.default_rng(5)
    x, y = rng.integers(SIZE // 2, SIZE * 3 // 2, size=2, endpoint=True)
    corners = [(x - SIZE, y - SIZE), (x, y - SIZE), (x - SIZE, y), (x, y)]
    matrix, gain = random_matrix((2 * SIZE, 2 * SIZE), (SIZE, SIZE), rng, geometry)
    placed, boxes = [], []
    for tile, image, (left, top), above, before in zip(tiles, images, corners, (1, 1, 0, 0), (1, 0, 1, 0), strict=True):
        left, top = (x - tile.hw[1] if before else left), (y - tile.hw[0] if above else top)
        x0, y0, x1, y1 = max(-left, 0), max(-top, 0), min(2 * SIZE - left, tile.hw[1]), min(2 * SIZE - top, tile.hw[0])
        placed.append((image[y0:y1, x0:x1], (left + x0, top + y0)))
        moved = tile.boxes + np.array([0, left, top, left, top], np.float32)
        moved[:, 1:] = moved[:, 1:].clip(0, 2 * SIZE)
        boxes += slow_boxes(moved, matrix, gain, (SIZE, SIZE))
    expected, sure = slow_warp(placed, matrix, (SIZE, SIZE))
    assert sure.mean() > 0.3
    assert np.abs(out - expected)[sure].max() <= 4
    found, wanted = (sorted(rows.tolist()) for rows in (found.round(2), np.array(boxes, np.float32).reshape(-1, 5).round(2)))
    assert np.allclose(found, wanted, atol=0.02)


def test_colour_jitter() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    out, _ = hsv(image, np.zeros((0, 5), np.float32), np.random.default_rng(7), 0.1, 0.5, 0.4)
    gains = 1 + np.random.default_rng(7).uniform(-1, 1, 3) * (0.1, 0.5, 0.4)
    far = 0
    for was, now in zip(image.reshape(-1, 3), out.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(was / 255))
        # Eight bits a plane, hue in steps of two degrees: what the gains are applied to is rounded, and cut off afterwards.
        planes = (round(hue * 180) * gains[0]) % 180, min(round(saturation * 255) * gains[1], 255), min(round(value * 255) * gains[2], 255)
        expected = colorsys.hsv_to_rgb(int(planes[0]) / 180, int(planes[1]) / 255, int(planes[2]) / 255)
        far += np.abs(now - np.array(expected) * 255).max() > 3
    assert far <= 3  # of 144: hue on the verge of two steps


@pytest.mark.parametrize("seed", range(3))
def test_mixup(seed: int) -> None:
    first, second = (smooth(seed, (8, 9)), random_boxes(0, (8, 9))), (smooth(seed + 1, (8, 9)), random_boxes(1, (8, 9), 2))
    image, boxes = mixup(first, second, np.random.default_rng(seed))
    share = np.random.default_rng(seed).beta(32, 32)
    for row in range(8):
        for column in range(9):
            for channel in range(3):
                expected = share * int(first[0][row, column, channel]) + (1 - share) * int(second[0][row, column, channel])
                assert abs(int(image[row, column, channel]) - expected) <= 0.51
    assert boxes.tolist() == first[1].tolist() + second[1].tolist()


def test_mirroring() -> None:
    image, boxes = smooth(0, (6, 9)), random_boxes(0, (6, 9))
    across, moved_across = flip_lr(image, boxes, np.random.default_rng(0), 1.0)
    down, moved_down = flip_ud(image, boxes, np.random.default_rng(0), 1.0)
    for row in range(6):
        for column in range(9):
            assert across[row, column].tolist() == image[row, 8 - column].tolist()
            assert down[row, column].tolist() == image[5 - row, column].tolist()
    for (c, x1, y1, x2, y2), one, other in zip(boxes.tolist(), moved_across.tolist(), moved_down.tolist(), strict=True):
        assert one == pytest.approx([c, 9 - x2, y1, 9 - x1, y2], abs=1e-5)
        assert other == pytest.approx([c, x1, 6 - y2, x2, 6 - y1], abs=1e-5)


@pytest.mark.parametrize("hw", [(20, 30), (30, 20), (40, 40)])
def test_letterbox(hw: tuple[int, int]) -> None:
    image = smooth(0, hw)
    out, gain, (left, top) = letterbox(image, (32, 32))
    assert gain == min(32 / hw[0], 32 / hw[1])
    height, width = round(hw[0] * gain), round(hw[1] * gain)
    for row in range(32):
        for column in range(32):
            if not (top <= row < top + height and left <= column < left + width):
                assert out[row, column].tolist() == [GREY] * 3
                continue
            x, y = ((value + 0.5) * side / new for value, side, new in ((column - left, hw[1], width), (row - top, hw[0], height)))
            value = slow_sample(image, min(max(x, 0.5), hw[1] - 0.5), min(max(y, 0.5), hw[0] - 0.5))
            assert value is not None
            assert np.abs(out[row, column] - value).max() <= 2


def outlined_tile(colour: int, hw: tuple[int, int], triangle: list[tuple[float, float]]) -> Tile:
    """A triangle on black, all of one colour, its box and its outline."""
    points = np.array(triangle, np.float32)
    image = np.zeros((*hw, 3), np.uint8)
    for row in range(hw[0]):
        for column in range(hw[1]):
            if inside((column + 0.5, row + 0.5), triangle):
                image[row, column] = colour
    box = np.array([[1, *points.min(0), *points.max(0)]], np.float32)
    return Tile(hw, box, lambda: image, [points])


def inside(point: tuple[float, float], triangle: list[tuple[float, float]]) -> bool:
    sides = zip(triangle, triangle[1:] + triangle[:1], strict=True)
    turns = [(b[0] - a[0]) * (point[1] - a[1]) - (b[1] - a[1]) * (point[0] - a[0]) for a, b in sides]
    return min(turns) >= 0 or max(turns) <= 0


def test_copy_paste_puts_the_mirrored_object_and_its_box_and_nothing_else() -> None:
    size, triangle = 64, [(10.0, 8.0), (40.0, 20.0), (14.0, 36.0)]
    tile = outlined_tile(200, (size, size), triangle)
    placed = [(tile, (0, 0))]
    canvas = (size, 2 * size)
    out, boxes = warp_canvas(placed, canvas, canvas, np.random.default_rng(0), Geometry(), copy_paste=1.0)
    plain, _ = warp_canvas(placed, canvas, canvas, np.random.default_rng(0), Geometry())
    assert boxes.tolist() == [[1, 10, 8, 40, 36], [1, 88, 8, 118, 36]]
    mirrored = [(2 * size - x, y) for x, y in triangle]
    for row in range(size):
        for column in range(2 * size):
            distance = min(abs(math.hypot(column - x, row - y)) for x, y in edge_points(mirrored))
            if distance > 1.5:
                expected = [200] * 3 if inside((column + 0.5, row + 0.5), mirrored) else plain[row, column].tolist()
                assert out[row, column].tolist() == expected, (row, column)


def edge_points(polygon: list[tuple[float, float]]) -> list[tuple[float, float]]:
    sides = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return [(a[0] + (b[0] - a[0]) * t / 40, a[1] + (b[1] - a[1]) * t / 40) for a, b in sides for t in range(40)]


def test_copy_paste_covers_no_object() -> None:
    """An object on the middle line would cover itself; one whose mirror image hits another stays away; of two that meet the first comes."""
    sources = np.array([[0, 45, 10, 55, 20], [1, 10, 50, 30, 60], [2, 5, 80, 15, 90], [2, 6, 81, 16, 91]], np.float32)
    boxes = np.concatenate([sources, np.array([[3, 72, 50, 88, 60]], np.float32)])
    chosen, pasted = choose_pastes(sources, boxes, 100, np.random.default_rng(0), 1.0)
    assert len(chosen) == 1
    assert chosen[0] in (2, 3)
    assert pasted[0].tolist() == [2, 100 - sources[chosen[0], 3], sources[chosen[0], 2], 100 - sources[chosen[0], 1], sources[chosen[0], 4]]
    assert choose_pastes(sources, boxes, 100, np.random.default_rng(0), 0.1)[0] == []  # a tenth of four is none


# Laws, for any input.

AUGMENTATIONS = {
    "letterbox": lambda image, boxes, rng: (letterbox(image, (40, 56))[0], boxes),
    "random_perspective": lambda image, boxes, rng: random_perspective(image, boxes, rng, GEOMETRIES["turned"]),
    "perspective": lambda image, boxes, rng: random_perspective(image, boxes, rng, GEOMETRIES["perspective"]),
    "hsv": lambda image, boxes, rng: hsv(image, boxes, rng, 0.1, 0.7, 0.4),
    "flip_lr": lambda image, boxes, rng: flip_lr(image, boxes, rng, 0.5),
    "flip_ud": lambda image, boxes, rng: flip_ud(image, boxes, rng, 0.5),
    "mixup": lambda image, boxes, rng: mixup((image, boxes), (image[::-1].copy(), boxes), rng),
    "mosaic": lambda image, boxes, rng: mosaic(tiles_of(image, boxes), 32, rng, GEOMETRIES["usual"]),
    "copy_paste": lambda image, boxes, rng: mosaic(tiles_of(image, boxes), 32, rng, GEOMETRIES["turned"], copy_paste=1.0),
}


def tiles_of(image: np.ndarray, boxes: np.ndarray) -> list[Tile]:
    outlines = [np.array([(x1, y1), (x2, y1), (x2, y2)], np.float32) for _, x1, y1, x2, y2 in boxes.tolist()]
    return [Tile(image.shape[:2], boxes, lambda: image, outlines)] * 4


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, height=st.integers(20, 40), width=st.integers(20, 40))
def test_laws_of_every_augmentation(name: str, seed: int, height: int, width: int) -> None:
    image, boxes = smooth(seed % 1000, (height, width)), random_boxes(seed % 1001, (height, width))
    image.flags.writeable = boxes.flags.writeable = False  # nothing may write to what it was given
    augment = AUGMENTATIONS[name]
    out, found = augment(image, boxes, np.random.default_rng(seed))
    again = augment(image, boxes, np.random.default_rng(seed))
    assert np.array_equal(out, again[0])  # the generator is all that is random
    assert np.array_equal(found, again[1])
    assert out.dtype == np.uint8
    assert out.ndim == 3
    if name != "letterbox":
        check_boxes(out, found)
    assert set(found[:, 0]) <= set(boxes[:, 0])  # no class comes from nowhere


def check_boxes(image: np.ndarray, boxes: np.ndarray) -> None:
    height, width = image.shape[:2]
    assert boxes.dtype == np.float32
    assert (boxes[:, 1:] >= 0).all()
    assert (boxes[:, [1, 3]] <= width).all()
    assert (boxes[:, [2, 4]] <= height).all()
    assert (boxes[:, 1:3] <= boxes[:, 3:]).all()


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=st.integers(8, 64))
def test_mirroring_twice_is_the_identity_and_once_keeps_areas_and_classes(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size + 3, 3), dtype=np.uint8)
    boxes = np.round(random_boxes(seed % 997, (size, size + 3)) * 8) / 8  # exact in float32, so that equality can be asked for
    for flip in (flip_lr, flip_ud):
        once: Labelled = flip(image, boxes, rng, 1.0)
        assert np.array_equal(once[1][:, 0], boxes[:, 0])
        assert np.array_equal(areas(once[1]), areas(boxes))
        twice = flip(*once, rng, 1.0)
        assert np.array_equal(twice[0], image)
        assert np.array_equal(twice[1], boxes)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, gain=st.floats(0.5, 2))
def test_scaling_multiplies_areas_and_turning_by_a_right_angle_keeps_them(seed: int, gain: float) -> None:
    boxes = random_boxes(seed % 991, (40, 40)) + np.array([0, 0, 0, 4, 4], np.float32)
    scaled = warp_boxes(boxes, np.diag([gain, gain, 1.0]), gain, (100, 100))
    assert np.allclose(areas(scaled), areas(boxes) * gain**2, rtol=1e-3)
    turn = np.array([[0.0, -1, 50], [1, 0, 0], [0, 0, 1]])
    turned = warp_boxes(boxes, turn, 1.0, (100, 100))
    assert np.allclose(areas(turned), areas(boxes), rtol=1e-3)
    assert np.array_equal(turned[:, 0], boxes[:, 0])


def areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
