"""Pipelines of albumentations (Buslaev et al., Information 11(2), 2020), given as the yaml file that the library itself writes.

The library is imported when a pipeline is used, never before: that takes seconds.
"""

from __future__ import annotations

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from horoyolo.config import InputError, read_yaml
from horoyolo.data.augment import Labelled

PROBES = 16  # made-up images that a pipeline is tried on before it is used


class Pipeline:
    """An augmentation: what a file's pipeline makes of an image, with all its randomness from the sample's generator."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self.file = file
        self.content = content

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.file, self.content)  # each process builds its own

    def __call__(self, image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> Labelled:
        """Image (H, W, 3) uint8 and boxes (n, 5), class and box_xyxy in pixels. A pipeline's own size (a crop, say) is scaled back to (H, W).

        Raises InputError when the pipeline fails or gives anything but such an image.
        """
        self._compose.set_random_seed(int(rng.integers(2**32)))
        try:
            found = self._compose(image=image, bboxes=boxes[:, 1:], rows=np.arange(len(boxes)))
        except Exception as error:
            raise InputError(f"{self.file}: the pipeline fails on an image: {_first_line(error)}") from error
        out, corners = found["image"], np.asarray(found["bboxes"], np.float32).reshape(-1, 4)
        if not isinstance(out, np.ndarray) or out.dtype != np.uint8 or out.ndim != 3 or out.shape[2] != 3:
            raise InputError(f"{self.file}: the pipeline's images must stay (height, width, 3) of uint8; leave out normalisation and tensors")
        if out.shape != image.shape:
            corners = corners * np.array([image.shape[1] / out.shape[1], image.shape[0] / out.shape[0]] * 2, np.float32)
            out = cv2.resize(out, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        classes = boxes[np.asarray(found["rows"], np.int64), :1]
        return out, np.concatenate([classes, corners], axis=1).astype(np.float32)

    @cached_property
    def _compose(self) -> Any:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it looks for a newer version on the network
        try:
            import albumentations
        except ImportError:
            raise InputError(f"{self.file} needs albumentations: pip install 'horoyolo[albumentations]'") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # an unknown or missing argument
                warnings.filterwarnings("ignore", "Got processor")  # that no step moves boxes is no fault
                given = albumentations.from_dict(self.content)
        except Exception as error:
            raise InputError(f"{self.file}: not a pipeline that albumentations {albumentations.__version__} can load: {_first_line(error)}") from None
        kept = ("min_area", "min_visibility", "min_width", "min_height", "max_accept_ratio")  # of the file; how boxes are handed over is ours
        limits = self.content["transform"].get("bbox_params") or {}
        params = albumentations.BboxParams(
            format="pascal_voc", label_fields=["rows"], clip=True, **{name: limits[name] for name in kept if limits.get(name) is not None}
        )
        steps, chance = (given.transforms, given.p) if isinstance(given, albumentations.Compose) else ([given], 1.0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got processor")
            return albumentations.Compose(steps, bbox_params=params, p=chance)


def load_pipeline(file: str | Path) -> Pipeline:
    """A pipeline that `albumentations.save(..., data_format="yaml")` wrote, tried on a few made-up images.

    Raises InputError when it can't be read, needs what is not installed, or makes anything but images of such images.
    """
    content = read_yaml(file, "a pipeline as albumentations.save(pipeline, file, data_format='yaml') writes it")
    if not isinstance(content.get("transform"), dict):
        raise InputError(f"{file}: no key `transform`; a pipeline as albumentations.save(pipeline, file, data_format='yaml') writes it is wanted")
    pipeline = Pipeline(Path(file), content)
    rng = np.random.default_rng(0)
    image, boxes = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8), np.array([[0, 30, 20, 90, 70]], np.float32)
    for _ in range(PROBES):
        pipeline(image, boxes, rng)
    return pipeline


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
