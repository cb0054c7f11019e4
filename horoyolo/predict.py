"""The predict command: objects found in image files, as JSON and drawn into copies of the images."""

from __future__ import annotations

import glob
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import cv2
import torch

from horoyolo.config import InputError
from horoyolo.data.augment import letterbox, scaled_hw
from horoyolo.data.decode import DecodeError, Image, decode_image
from horoyolo.data.spec import IMAGE_SUFFIXES
from horoyolo.engine.device import Numerics, numerics_for, pick_device
from horoyolo.files import atomic_file
from horoyolo.model.boxes import clip_boxes, non_max_suppression
from horoyolo.model.weights import model_from_weights
from horoyolo.model.yolo import YOLO, fuse_conv_bn
from horoyolo.report.draw import draw_boxes
from horoyolo.report.logs import start_logs

log = logging.getLogger("horoyolo")

DEFAULT_SIZE = 640
PREDICTIONS = "predictions.json"

Box = dict[str, Any]  # xyxy in pixels of the upright image, confidence, class, name


def predict(
    weights: str | Path, source: str, out: str | Path, img: int | None = None, conf: float = 0.25, iou: float = 0.45, device: str = ""
) -> list[dict[str, Any]]:
    """Finds objects in the images of ``source`` (a file, a folder or a pattern) and writes ``out/predictions.json`` and annotated copies.

    Images are scaled to ``img`` pixels on their longest side; None takes the size the weights were trained at, where their file says it.
    Returns what predictions.json holds: an entry for each image, in order, with its boxes by falling confidence; an image that can't be
    read has none, and its ``error``. Raises InputError, before anything is written, for a source without images, bad weights, or an
    ``out`` that is no folder to write to or holds the source's images.
    """
    start_logs(0, 1)
    images = find_images(source)
    _check_out(Path(out), images)
    numerics = numerics_for(pick_device(device, 0), "fp32")
    model, meta = model_from_weights(weights)
    model = fuse_conv_bn(model).to(numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]
    size = img or meta.get("img") or DEFAULT_SIZE
    _make_folder(Path(out))

    predictions = []
    for path, target in annotated_paths(images, Path(out)).items():
        entry: dict[str, Any] = {"image": str(path), "boxes": []}
        try:
            image = decode_image(path)
        except DecodeError as error:
            entry["error"] = str(error)
            log.warning("%s: left out: %s", path, error)
        else:
            entry["boxes"] = boxes = detect(model, image, size, conf, iou, numerics)
            _write_image(target, annotated(image, boxes))
            log.info("%s: %s", path, _count_names(boxes))
        predictions.append(entry)
    with atomic_file(Path(out) / PREDICTIONS, "w") as stream:
        json.dump(predictions, stream, indent=1)
    log.info("%d images; boxes in %s, annotated images beside it", len(predictions), Path(out) / PREDICTIONS)
    return predictions


def find_images(source: str) -> list[Path]:
    """The image files that ``source`` means, sorted: itself, those in a folder, or those a pattern matches (InputError: none)."""
    path = Path(source)
    if path.is_dir():
        candidates: Iterable[Path] = path.iterdir()
    elif path.is_file():  # before patterns: a name may hold brackets
        candidates = [path]
    else:
        candidates = [Path(match) for match in glob.glob(source, recursive=True)]
        if not candidates:
            raise InputError(f"--source {source}: no such file or folder, and no file matches it as a pattern")
    images = sorted({file for file in candidates if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()})
    if not images:
        raise InputError(f"--source {source}: no images there; names ending in {', '.join(sorted(IMAGE_SUFFIXES))} are wanted")
    return images


def annotated_paths(images: Sequence[Path], out: Path) -> dict[Path, Path]:
    """A file in ``out`` for each image: the first of a name keeps it, others of that name (from other folders) get a number."""
    own_names = {image.name for image in images}
    taken: set[str] = set()
    paths = {}
    for image in images:
        writable = image if cv2.haveImageWriter(image.name) else Path(f"{image.name}.jpg")  # OpenCV reads more formats than it writes
        numbered = (f"{writable.stem}-{number}{writable.suffix}" for number in count(2))
        candidates = chain([writable.name], numbered)
        name = next(name for name in candidates if name not in taken and (name == image.name or name not in own_names))
        taken.add(name)
        paths[image] = out / name
    return paths


def detect(model: YOLO, image: Image, size: int, conf: float, iou: float, numerics: Numerics) -> list[Box]:
    """The objects in an image, by falling confidence. The image is scaled to ``size`` on its longest side and padded to whole strides."""
    letterboxed, gain, pad = letterbox(image, _padded_hw(image.shape[:2], size, max(model.strides)))
    pixels = torch.from_numpy(letterboxed).permute(2, 0, 1)[None]  # (1, 3, h, w)
    with torch.inference_mode(), numerics.autocast():
        decoded = model.decode(model(numerics.as_input(pixels)))
    (found,) = non_max_suppression(decoded.cpu(), conf, iou)  # (n, 6)
    boxes_xyxy = clip_boxes((found[:, :4] - found.new_tensor(pad).repeat(2)) / gain, image.shape[1], image.shape[0])
    return [
        {
            "xyxy": [round(value, 2) for value in box_xyxy],
            "confidence": round(confidence, 5),
            "class": int(class_id),
            "name": model.names.get(int(class_id), str(int(class_id))),
        }
        for box_xyxy, confidence, class_id in zip(boxes_xyxy.tolist(), found[:, 4].tolist(), found[:, 5].tolist(), strict=True)
    ]


def annotated(image: Image, boxes: list[Box]) -> Image:
    """A copy of the image with the boxes, their names and their confidences drawn into it."""
    captions = [f"{box['name']} {box['confidence']:.2f}" for box in boxes]
    return draw_boxes(image, [box["xyxy"] for box in boxes], [box["class"] for box in boxes], captions)


def _padded_hw(hw: tuple[int, int], size: int, stride: int) -> tuple[int, int]:
    height, width = scaled_hw(hw, size / max(hw))
    return math.ceil(height / stride) * stride, math.ceil(width / stride) * stride


def _check_out(out: Path, images: list[Path]) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder; name a new one or one that may be written to")
    if out.resolve() in {image.parent.resolve() for image in images}:
        raise InputError(f"--out {out}: the images of --source lie there and would be overwritten; name another folder")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: can't be made ({error.strerror}); name a folder that can") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out}: can't be written to; name a folder that can")


def _write_image(path: Path, image: Image) -> None:
    ok, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert ok, path
    with atomic_file(path) as stream:
        stream.write(encoded)


def _count_names(boxes: list[Box]) -> str:
    counts = Counter(box["name"] for box in boxes)
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"
