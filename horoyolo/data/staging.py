"""A data set as it is laid out on other hosts, and what tells that it is the same there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from horoyolo.config import InputError
from horoyolo.data.labels import label_path
from horoyolo.data.scan import Split, scan_split
from horoyolo.data.spec import DataSpec

USED = ("train", "val")  # what training reads


@dataclass(frozen=True)
class Layout:
    """A data set's files under new names, all below one folder."""

    name: str  # of that folder: the data set's name and the first 12 digits of the hash
    files: list[tuple[str, Path]]  # name below that folder, where the file is now
    texts: dict[str, str]  # name below that folder -> content: data.yaml and the list of each split
    hash: str  # what `describe_content` gives for the copy
    num_bytes: int  # of all files


def describe_content(splits: Iterable[Split]) -> dict[str, Any]:
    """What a data set holds, in plain values: figures of each split and the hash of it all, the same on every host that has the same data.

    The hash covers class names, image names, sizes of image files, image sizes in pixels, and labels.
    """
    splits = list(splits)
    figures = {split.name: {"images": len(split), "boxes": split.report.boxes, "hash": _split_hash(split)} for split in splits}
    digest = hashlib.sha256(json.dumps(splits[0].names).encode())
    for name, figure in figures.items():
        digest.update(f"{name} {figure['hash']}\0".encode())
    return {"hash": digest.hexdigest(), "splits": figures}


def plan_layout(spec: DataSpec) -> Layout:
    """How a data set is laid out on another host: the images and labels that training uses, with lists instead of the folders named now.

    Raises InputError as `scan_split` does.
    """
    splits = [scan_split(spec, name) for name in USED]
    images = sorted({image for split in splits for image in split.image_paths})
    wanted = [*images, *map(label_path, images)]
    base = Path(os.path.commonpath([file.parent for file in wanted]))
    # Labels are found by the last `images` in a path: without one of its own, the folder above a copy could decide where they are looked for.
    own = all("images" in image.relative_to(base).parent.parts for image in images)
    names = {image: ("" if own else "images/") + image.relative_to(base).as_posix() for image in images}
    labels = {label_path(Path(names[image])).as_posix(): label_path(image) for image in images}
    for name in names.values():
        if name.splitlines() != [name.strip()]:
            raise InputError(f"{spec.file}: no list of images can hold {name!r}: a line break in it, or a space at an end")
    files = [(name, image) for image, name in names.items()]
    annotated = {label_path(image) for split in splits for image in spec.annotations(split.name)}
    files += [(name, label) for name, label in labels.items() if label not in annotated and label.is_file()]
    texts = {"data.yaml": _data_yaml(spec, [split.name for split in splits])}
    # Boxes from COCO files travel as label files, with as many digits as their bits need.
    new_names = {label: name for name, label in labels.items()}
    for split in splits:
        for image, boxes in zip(split.image_paths, split.labels, strict=True):
            if label_path(image) in annotated:
                texts[new_names[label_path(image)]] = "".join(" ".join(f"{value:.9g}" for value in box) + "\n" for box in boxes)
    texts |= {f"{split.name}.txt": "".join(f"./{names[image]}\n" for image in split.image_paths) for split in splits}
    content = describe_content(_renamed(split, [names[image] for image in split.image_paths]) for split in splits)
    num_bytes = sum(os.path.getsize(file) for _, file in files) + sum(len(text.encode()) for text in texts.values())
    return Layout(f"{_name(spec)}-{content['hash'][:12]}", files, texts, content["hash"], num_bytes)


def _split_hash(split: Split) -> str:
    digest = hashlib.sha256(split.content_hash.encode())
    for image in split.image_paths:
        digest.update(f"{os.path.getsize(image)} ".encode())
    return digest.hexdigest()


def _renamed(split: Split, names: Sequence[str]) -> Split:
    """The same split, its images known by other names in the same order."""
    return Split(split.name, split.root, split.image_paths, split.shapes_hw, split.labels, split.names, split.report, list(names), split.outlines)


def _data_yaml(spec: DataSpec, splits: Sequence[str]) -> str:
    content: dict[str, object] = {name: f"{name}.txt" for name in splits}
    return yaml.safe_dump(content | {"nc": spec.num_classes, "names": spec.names}, sort_keys=False, allow_unicode=True)


def _name(spec: DataSpec) -> str:
    """The data set's name: its yaml's, or the folder's where that is just data.yaml. Signs that mean something to a shell become `_`."""
    name = spec.file.stem if spec.file.stem not in ("data", "dataset") else Path(os.path.abspath(spec.file)).parent.name
    return "".join(sign if sign.isascii() and (sign.isalnum() or sign in "-_") else "_" for sign in name) or "data"
