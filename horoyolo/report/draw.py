"""Boxes with captions drawn into an image."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

FONT = cv2.FONT_HERSHEY_SIMPLEX
GOLDEN_RATIO = 0.618034


def draw_boxes(image: np.ndarray, boxes_xyxy: Iterable[Sequence[float]], classes: Sequence[int], captions: Sequence[str]) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 RGB with boxes (n, 4), in pixels, in the colours of their classes, each with its caption.

    Lines and letters grow with the image. Earlier boxes lie over later ones: give them by falling confidence.
    """
    image = np.ascontiguousarray(image).copy()
    width = max(round(sum(image.shape[:2]) / 2 * 0.003), 2)
    for box_xyxy, class_id, caption in reversed(list(zip(boxes_xyxy, classes, captions, strict=True))):
        left, top, right, bottom = (round(float(value)) for value in box_xyxy)
        cv2.rectangle(image, (left, top), (right, bottom), class_colour(class_id), width, cv2.LINE_AA)
        _draw_caption(image, caption, (left, top), class_colour(class_id), width)
    return image


def class_colour(class_id: int) -> tuple[int, int, int]:
    """An RGB colour for each class; steps of the golden ratio around the colour wheel keep neighbours apart."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * GOLDEN_RATIO % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_caption(image: np.ndarray, caption: str, corner: tuple[int, int], colour: tuple[int, int, int], width: int) -> None:
    """The caption on a ground of its own, above the box's upper left corner, below it where there is no room; always inside the image."""
    scale, thickness = width / 4, max(width // 2, 1)
    (text_width, text_height), baseline = cv2.getTextSize(caption, FONT, scale, thickness)
    height = text_height + baseline + width
    left = max(min(corner[0], image.shape[1] - text_width - width), 0)
    top = corner[1] - height if corner[1] >= height else max(corner[1], 0)
    cv2.rectangle(image, (left, top), (left + text_width + width, top + height), colour, cv2.FILLED)
    luminance = np.dot(colour, (0.299, 0.587, 0.114))
    ink = (0, 0, 0) if luminance > 140 else (255, 255, 255)
    cv2.putText(image, caption, (left + width // 2, top + height - baseline), FONT, scale, ink, thickness, cv2.LINE_AA)
