"""Seeded scenes of coloured shapes on a textured ground: a data set small enough to learn while one waits."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from horoyolo.config import InputError
from horoyolo.data.augment import Labelled
from horoyolo.data.folder import FolderReport, FolderWriter, PixelBox, new_folder

NAMES = ("circle", "square", "triangle")
HUES = (0, 60, 120)  # each class's middle hue in OpenCV's half degrees: red, green, blue


def write_synthetic(out: str | Path, images: int, seed: int = 0, hw: tuple[int, int] = (240, 320)) -> FolderReport:
    """Write scenes as a data set with data.yaml: every fifth image is for val, the others for train.

    The same arguments give the same files. Raises InputError for fewer than 2 images, a seed below 0, or where `out` exists.
    """
    if images < 2:
        raise InputError(f"{images} images are too few: one is needed for train and one for val, so at least 2")
    if seed < 0:
        raise InputError(f"seed {seed}; at least 0 is wanted")
    with new_folder(Path(out)) as folder:
        writer = FolderWriter(folder, NAMES, ("train", "val"))
        for number in range(images):
            image, boxes = draw_scene(np.random.default_rng([seed, number]), hw)
            split = "val" if number % 5 == 4 or number == images - 1 < 4 else "train"
            labels: list[PixelBox] = [(int(class_id), *map(float, corners)) for class_id, *corners in boxes]  # type: ignore[misc]
            writer.add(split, f"scene-{number:05d}.jpg", simplejpeg.encode_jpeg(image, quality=90), labels)
        writer.finish()
    return writer.report


def draw_scene(rng: np.random.Generator, hw: tuple[int, int]) -> Labelled:
    """One to six shapes that hardly overlap; gives the image (*hw, 3) and boxes (n, 5), class and box_xyxy in pixels."""
    image = _texture(rng, hw)
    boxes: list[tuple[float, ...]] = []
    for _ in range(rng.integers(1, 7)):
        radius = int(rng.integers(min(hw) // 16, min(hw) // 6))
        x, y = (int(rng.integers(radius + 1, side - radius - 1)) for side in hw[::-1])
        if any(_overlap((x, y), radius, box[1:]) for box in boxes):
            continue
        class_id = int(rng.integers(len(NAMES)))
        boxes.append((class_id, *_draw_shape(image, class_id, (x, y), radius, rng)))
    return image, np.array(boxes, np.float32).reshape(-1, 5)


def _draw_shape(image: np.ndarray, class_id: int, centre: tuple[int, int], radius: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Draw in place; gives the shape's box_xyxy in pixels."""
    hue = (HUES[class_id] + rng.integers(-15, 16)) % 180
    pixel = np.array([[[hue, rng.integers(130, 256), rng.integers(110, 256)]]], np.uint8)
    colour = tuple(int(value) for value in cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0])
    x, y = centre
    if NAMES[class_id] == "circle":
        cv2.circle(image, centre, radius, colour, cv2.FILLED, cv2.LINE_AA)
    elif NAMES[class_id] == "square":
        cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), colour, cv2.FILLED)
    else:
        corners = np.array([[x, y - radius], [x - radius, y + radius], [x + radius, y + radius]])
        cv2.fillPoly(image, [corners], colour, cv2.LINE_AA)
    return x - radius, y - radius, x + radius + 1, y + radius + 1


def _overlap(centre: tuple[int, int], radius: int, box_xyxy: tuple[float, ...]) -> bool:
    x, y = centre
    x1, y1, x2, y2 = box_xyxy
    return x1 < x + radius and x2 > x - radius and y1 < y + radius and y2 > y - radius


def _texture(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """Soft, greyish patches with grain, (*hw, 3) uint8."""
    patches = rng.integers(70, 180, (6, 8, 1)) + rng.integers(-20, 21, (6, 8, 3))
    smooth = cv2.resize(patches.astype(np.float32), hw[::-1], interpolation=cv2.INTER_CUBIC)
    return (smooth + rng.normal(0, 8, (*hw, 3))).clip(0, 255).astype(np.uint8)
