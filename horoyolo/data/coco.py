"""COCO instances files: images, boxes and categories of one json."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from horoyolo.config import InputError


@dataclass(frozen=True)
class CocoImage:
    """An image and its objects, as annotated."""

    name: str  # the file, below the folder of images
    hw: tuple[int, int] | None  # as the file says
    objects: tuple[tuple[str, float, float, float, float], ...]  # category, x1, y1, x2, y2 in pixels
    crowds: int  # objects left out because they are marked as crowds


@dataclass(frozen=True)
class CocoFile:
    """A COCO instances file."""

    categories: tuple[str, ...]  # in the order of their ids
    images: tuple[CocoImage, ...]


def read_coco(file: Path) -> CocoFile:
    """Read an instances file. Raises InputError for what can't be read or is none."""
    try:
        return _read(file, file.stat().st_mtime_ns)
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror}; give a COCO instances file") from None


@lru_cache(maxsize=3)  # train, val and test: names, images and labels are asked for one by one
def _read(file: Path, mtime_ns: int) -> CocoFile:
    try:
        content = json.loads(file.read_bytes())
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        objects = defaultdict(list)
        crowds: dict[object, int] = defaultdict(int)
        for item in content["annotations"]:
            if item.get("iscrowd"):
                crowds[item["image_id"]] += 1
                continue
            x, y, width, height = (float(value) for value in item["bbox"])
            objects[item["image_id"]].append((categories[item["category_id"]], x, y, x + width, y + height))
        images = tuple(
            CocoImage(str(image["file_name"]), _hw(image), tuple(objects[image["id"]]), crowds[image["id"]])
            for image in {image["id"]: image for image in content["images"]}.values()
        )
        return CocoFile(tuple(categories[key] for key in sorted(categories)), images)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a COCO instances file: {type(error).__name__} {error}") from None


def _hw(image: dict) -> tuple[int, int] | None:
    return (int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None
