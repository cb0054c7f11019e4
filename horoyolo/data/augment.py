"""Augmentations: functions of an image, its boxes and a random generator that give a new image and new boxes.

Images are (H, W, 3) uint8 RGB; boxes are (n, 5) float32, class and box_xyxy in pixels. Inputs are never changed. The recipe is YOLOv5's
(mosaic: Bochkovskiy et al., YOLOv4, arXiv 2004.10934, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from horoyolo.data.decode import Image

GREY = 114  # the background where no image is
Labelled = tuple[Image, np.ndarray]


class Tile(NamedTuple):
    """An image that is decoded only if some of it is seen."""

    hw: tuple[int, int]
    boxes: np.ndarray  # (n, 5)
    load: Callable[[], Image | None]  # an image of size hw; none if the file can't be read: then it is grey and has no boxes
    outlines: Sequence[np.ndarray] = ()  # of each box (k, 2), x and y in pixels, empty where there is none; or of no box at all


class Geometry(NamedTuple):
    """Ranges of a random affine or perspective transformation, named as in YOLOv5's hyper-parameters."""

    degrees: float = 0.0  # rotation, +/-
    translate: float = 0.0  # +/- part of the output's size
    scale: float = 0.0  # gain 1 +/- this
    shear: float = 0.0  # degrees, +/-
    perspective: float = 0.0  # +/-, 0 to 0.001


def letterbox(
    image: Image, hw: tuple[int, int], interpolation: int = cv2.INTER_LINEAR, gain: float | None = None
) -> tuple[Image, float, tuple[float, float]]:
    """Scale an image by ``gain``, by default until it fits into hw, with its aspect kept and grey added on all sides up to hw.

    Returns the image (*hw, 3), the gain and the pad (x, y): a point of the original lies at gain * point + pad.
    """
    height, width = image.shape[:2]
    gain = gain or min(hw[0] / height, hw[1] / width)
    new_h, new_w = scaled_hw((height, width), gain)
    if (new_h, new_w) != (height, width):
        image = cv2.resize(image, (new_w, new_h), interpolation=interpolation)
    left, top = letterbox_pad((height, width), hw, gain)
    out = _grey(hw)
    out[top : top + new_h, left : left + new_w] = image
    return out, gain, (left, top)


def letterbox_pad(original_hw: tuple[int, int], hw: tuple[int, int], gain: float) -> tuple[int, int]:
    """The pixels (x, y) before an image scaled by ``gain`` in the middle of hw; an odd line goes to the bottom, to the right."""
    new_h, new_w = scaled_hw(original_hw, gain)
    return round((hw[1] - new_w) / 2 - 0.1), round((hw[0] - new_h) / 2 - 0.1)


def scaled_hw(hw: tuple[int, int], gain: float) -> tuple[int, int]:
    """The size of an image times a gain, in whole pixels, at least one."""
    return max(round(hw[0] * gain), 1), max(round(hw[1] * gain), 1)


def mosaic(
    tiles: Sequence[Tile], size: int, rng: np.random.Generator, geometry: Geometry, zoom: float = 1.0, copy_paste: float = 0.0
) -> Labelled:
    """Four images around a random point of a canvas of twice ``size``, of which a random transformation shows the middle.

    The canvas is never drawn: each tile is warped straight to where it is seen in the output, (size, size) times ``zoom``, and a tile that
    isn't seen isn't decoded.
    """
    centre_x, centre_y = (int(value) for value in rng.integers(size // 2, size * 3 // 2, size=2, endpoint=True))
    corners = [(centre_x - (i % 2 == 0) * tile.hw[1], centre_y - (i < 2) * tile.hw[0]) for i, tile in enumerate(tiles)]
    out = round(size * zoom)
    return warp_canvas(list(zip(tiles, corners, strict=True)), (2 * size, 2 * size), (out, out), rng, geometry, zoom, copy_paste)


def random_perspective(image: Image, boxes: np.ndarray, rng: np.random.Generator, geometry: Geometry) -> Labelled:
    """A random transformation of an image, at the same size."""
    hw = image.shape[:2]
    return warp_canvas([(Tile(hw, boxes, lambda: image), (0, 0))], hw, hw, rng, geometry)


def warp_canvas(
    placed: Sequence[tuple[Tile, tuple[int, int]]],
    canvas: tuple[int, int],
    hw: tuple[int, int],
    rng: np.random.Generator,
    geometry: Geometry,
    zoom: float = 1.0,
    copy_paste: float = 0.0,
) -> Labelled:
    """Tiles at their top left corners (x, y) on a grey canvas (height, width), seen through one random transformation.

    The middle of the canvas goes to the middle of the output, (*hw, 3), give or take the translation, ``zoom`` times as large. Boxes are clipped
    to what is seen and kept where enough of them is left. ``copy_paste`` is the part of the objects with an outline that come a second time, see
    `choose_pastes`.
    """
    matrix, gain = random_matrix(canvas, hw, rng, geometry, zoom)
    out = cv2.cvtColor(_grey(hw), cv2.COLOR_RGB2RGBA)  # warping four channels is 2.5 times as fast as three
    boxes = [np.zeros((0, 5), np.float32)]
    outlined: list[tuple[np.ndarray, np.ndarray, Image, tuple[int, int]]] = []  # box and outline on the canvas, the tile's pixels and corner there
    for tile, (x, y) in placed:
        x0, y0, x1, y1 = max(-x, 0), max(-y, 0), min(canvas[1] - x, tile.hw[1]), min(canvas[0] - y, tile.hw[0])  # the part on the canvas
        to_out = matrix @ _shift(x + x0, y + y0)
        seen = _seen_rectangle(to_out, (y1 - y0, x1 - x0), hw)
        if seen is None:
            continue
        image = tile.load()
        if image is None:
            continue
        _draw(out, image[y0:y1, x0:x1], to_out, seen)
        boxes.append(tile.boxes + np.array([0, x, y, x, y], np.float32))
        if copy_paste:
            shown = (image[y0:y1, x0:x1], (x + x0, y + y0))
            moved = (outline + np.array((x, y), np.float32) for outline in tile.outlines)
            outlined += [(box, outline, *shown) for box, outline in zip(boxes[-1], moved, strict=False) if len(outline)]
    on_canvas = np.concatenate(boxes)
    on_canvas[:, 1:] = on_canvas[:, 1:].clip(0, canvas[::-1] * 2)
    if outlined:
        mirror = np.array([[-1, 0, canvas[1]], [0, 1, 0], [0, 0, 1]], float)
        sources = np.array([box for box, *_ in outlined]).reshape(-1, 5)
        sources[:, 1:] = sources[:, 1:].clip(0, canvas[::-1] * 2)
        chosen, pasted = choose_pastes(sources, on_canvas, canvas[1], rng, copy_paste)
        for i in chosen:
            _, outline, pixels, (x, y) = outlined[i]
            _paste(out, pixels, matrix @ mirror @ _shift(x, y), outline.clip(0, canvas[::-1]) - (x, y))
        on_canvas = np.concatenate([on_canvas, pasted])
    return cv2.cvtColor(out, cv2.COLOR_RGBA2RGB), warp_boxes(on_canvas, matrix, gain, hw)


def random_matrix(
    canvas: tuple[int, int], hw: tuple[int, int], rng: np.random.Generator, geometry: Geometry, zoom: float = 1.0
) -> tuple[np.ndarray, float]:
    """A random transformation (3, 3) from coordinates of a canvas (height, width) to those of the output, hw, and its gain."""
    to_middle = _shift(-canvas[1] / 2, -canvas[0] / 2)
    perspective = np.eye(3)
    perspective[2, :2] = rng.uniform(-geometry.perspective, geometry.perspective, 2)
    angle = math.radians(rng.uniform(-geometry.degrees, geometry.degrees))
    gain = zoom * rng.uniform(1 - geometry.scale, 1 + geometry.scale)
    cos, sin = gain * math.cos(angle), gain * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear = np.eye(3)
    shear[[0, 1], [1, 0]] = np.tan(np.radians(rng.uniform(-geometry.shear, geometry.shear, 2)))
    to_place = _shift(*(rng.uniform(0.5 - geometry.translate, 0.5 + geometry.translate, 2) * hw[::-1]))
    return to_place @ shear @ rotation @ perspective @ to_middle, gain


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray, gain: float, hw: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 5) around the warped corners of the given ones, clipped to the output, less those that `box_candidates` refuses."""
    corners = boxes[:, [1, 2, 3, 2, 3, 4, 1, 4]].reshape(-1, 4, 2)
    points = np.concatenate([corners, np.ones_like(corners[..., :1])], axis=2) @ matrix.T  # (n, 4, 3)
    points = points[..., :2] / points[..., 2:]
    warped = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1).clip(0, hw[::-1] * 2)  # (n, 4)
    keep = box_candidates(boxes[:, 1:] * gain, warped)
    return np.concatenate([boxes[:, :1], warped], axis=1).astype(np.float32)[keep]


def choose_pastes(
    sources: np.ndarray, boxes: np.ndarray, width: int, rng: np.random.Generator, part: float
) -> tuple[list[int], np.ndarray]:
    """Which objects come a second time, mirrored on the canvas' middle line, and their new boxes (k, 5).

    ``sources`` (n, 5) are the objects that have an outline, ``boxes`` (m, 5) all objects. A random ``part`` of the sources is tried; one that would
    cover 30 % or more of an object, or of an earlier paste, is left out. Copy-paste is Ghiasi et al., arXiv 2012.07177; mirroring within the
    mosaic is YOLOv5's.
    """
    chosen, present = [], boxes
    for i in rng.permutation(len(sources))[: round(part * len(sources))]:
        box = sources[i].copy()
        box[[1, 3]] = width - box[[3, 1]]
        overlap = (np.minimum(present[:, 3:], box[3:]) - np.maximum(present[:, 1:3], box[1:3])).clip(0).prod(1)
        area = (present[:, 3:] - present[:, 1:3]).prod(1)
        if (overlap < 0.3 * np.maximum(area, 1e-6)).all():
            chosen.append(int(i))
            present = np.concatenate([present, box[None]])
    return chosen, present[len(boxes) :]


def box_candidates(before_xyxy: np.ndarray, after_xyxy: np.ndarray) -> np.ndarray:
    """Boxes (n,) to keep after a transformation: sides over 2 px and within 1:100, more than a tenth of the area left."""
    w_before, h_before = (before_xyxy[:, 2:] - before_xyxy[:, :2]).T
    w, h = (after_xyxy[:, 2:] - after_xyxy[:, :2]).T
    tiny = 1e-16
    aspect = np.maximum(w / (h + tiny), h / (w + tiny))
    return (w > 2) & (h > 2) & (w * h / (w_before * h_before + tiny) > 0.1) & (aspect < 100)


def mixup(first: Labelled, second: Labelled, rng: np.random.Generator) -> Labelled:
    """Two images blended and the boxes of both (Zhang et al., arXiv 1710.09412), with a share from Beta(32, 32): about half of each."""
    share = rng.beta(32.0, 32.0)
    image = cv2.addWeighted(first[0], share, second[0], 1 - share, 0)
    return image, np.concatenate([first[1], second[1]])


def hsv(image: Image, boxes: np.ndarray, rng: np.random.Generator, hue: float, saturation: float, value: float) -> Labelled:
    """Hue, saturation and value times random gains 1 +/- the given parts."""
    gains = 1 + rng.uniform(-1, 1, 3) * (hue, saturation, value)
    if not (hue or saturation or value):
        return image, boxes
    levels = np.arange(256)
    tables = ((levels * gains[0]) % 180, (levels * gains[1]).clip(0, 255), (levels * gains[2]).clip(0, 255))
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    changed = cv2.merge([cv2.LUT(plane, table.astype(np.uint8)) for plane, table in zip(planes, tables, strict=True)])
    return cv2.cvtColor(changed, cv2.COLOR_HSV2RGB), boxes


def flip_lr(image: Image, boxes: np.ndarray, rng: np.random.Generator, probability: float) -> Labelled:
    """Left and right swapped, with a probability."""
    if rng.random() >= probability:
        return image, boxes
    flipped = boxes.copy()
    flipped[:, [1, 3]] = image.shape[1] - boxes[:, [3, 1]]
    return cv2.flip(image, 1), flipped


def flip_ud(image: Image, boxes: np.ndarray, rng: np.random.Generator, probability: float) -> Labelled:
    """Top and bottom swapped, with a probability."""
    if rng.random() >= probability:
        return image, boxes
    flipped = boxes.copy()
    flipped[:, [2, 4]] = image.shape[0] - boxes[:, [4, 2]]
    return cv2.flip(image, 0), flipped


def _grey(hw: tuple[int, int]) -> Image:
    return np.full((*hw, 3), GREY, np.uint8)


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], float)


def _seen_rectangle(matrix: np.ndarray, hw: tuple[int, int], out_hw: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """x0, y0, x1, y1 of the output's pixels that a tile may touch; all of them under a perspective, where corners may be behind the eye."""
    if min(hw) <= 0:
        return None
    if matrix[2, 0] or matrix[2, 1]:
        return 0, 0, out_hw[1], out_hw[0]
    low, high = _bounds(matrix, hw)
    x0, y0 = np.floor(low).clip(0, out_hw[::-1]).astype(int)
    x1, y1 = np.ceil(high).clip(0, out_hw[::-1]).astype(int)
    return (int(x0), int(y0), int(x1), int(y1)) if x0 < x1 and y0 < y1 else None


def _draw(out: np.ndarray, image: Image, matrix: np.ndarray, seen: tuple[int, int, int, int]) -> None:
    """Warp an image (h, w, 3) into its rectangle of the output (H, W, 4), in place; what it doesn't cover stays."""
    x0, y0, x1, y1 = seen
    left, top, right, bottom = _needed(np.linalg.inv(matrix) @ _shift(x0, y0), (y1 - y0, x1 - x0), image.shape[:2])
    if left >= right or top >= bottom:  # a turned tile passes by its own rectangle's part of the output
        return
    # Coordinates are continuous here and pixel centres lie at halves; OpenCV counts from the centre of the first pixel.
    matrix = _shift(-0.5 - x0, -0.5 - y0) @ matrix @ _shift(left + 0.5, top + 0.5)
    target = out[y0:y1, x0:x1]
    source = cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2RGBA)
    hw = (x1 - x0, y1 - y0)
    if matrix[2, 0] or matrix[2, 1]:
        cv2.warpPerspective(source, matrix, hw, dst=target, borderMode=cv2.BORDER_TRANSPARENT)
    else:
        cv2.warpAffine(source, matrix[:2], hw, dst=target, borderMode=cv2.BORDER_TRANSPARENT)


def _paste(out: np.ndarray, image: Image, matrix: np.ndarray, outline: np.ndarray) -> None:
    """Warp what an outline (k, 2) of an image (h, w, 3) encloses into the output (H, W, 4), in place."""
    seen = _seen_rectangle(matrix, image.shape[:2], out.shape[:2])
    if seen is None:
        return
    layer = out.copy()
    _draw(layer, image, matrix, seen)
    points = np.concatenate([outline, np.ones_like(outline[:, :1])], axis=1) @ matrix.T
    mask = np.zeros(out.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(points[:, :2] / points[:, 2:] - 0.5).astype(np.int32)], 1)
    np.copyto(out, layer, where=mask[..., None] > 0)


def _needed(to_image: np.ndarray, seen_hw: tuple[int, int], hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the pixels of an image that a part of the output is interpolated from: no others need be touched."""
    if to_image[2, 0] or to_image[2, 1]:
        return 0, 0, hw[1], hw[0]
    low, high = _bounds(to_image, seen_hw)
    x0, y0 = (int(value) for value in np.floor(low - 2).clip(0, hw[::-1]))
    x1, y1 = (int(value) for value in np.ceil(high + 2).clip(0, hw[::-1]))
    return x0, y0, x1, y1


def _bounds(affine: np.ndarray, hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest (x, y) of a rectangle under an affine transformation."""
    height, width = hw
    corners = affine[:2] @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])  # (2, 4)
    return corners.min(axis=1), corners.max(axis=1)
