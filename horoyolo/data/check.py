"""A thorough look at a data set: what the scan sees, and what only the pixels of every image tell."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from horoyolo.data.decode import DecodeError, decode_image, image_form, is_damaged
from horoyolo.data.labels import label_path
from horoyolo.data.scan import ScanReport, Split, scan_split, shorten
from horoyolo.data.spec import DataSpec


@dataclass
class SplitCheck:
    """What is to be known of a split beside its scan; names of images, relative to the data set's folder."""

    scan: ScanReport
    damaged: list[str] = field(default_factory=list)  # used as far as their pixels can be decoded
    undecodable: list[str] = field(default_factory=list)  # grey wherever they are met, without boxes
    rotated: list[str] = field(default_factory=list)  # from here on: fine, but to be known
    grey: list[str] = field(default_factory=list)
    alpha: list[str] = field(default_factory=list)
    cmyk: list[str] = field(default_factory=list)
    sixteen_bit: list[str] = field(default_factory=list)
    same_pixels: list[str] = field(default_factory=list)  # as an earlier image of the split, or of another one: "a.jpg = b.jpg"
    also_elsewhere: list[str] = field(default_factory=list)
    stray_labels: list[str] = field(default_factory=list)  # label files without an image
    unseen_classes: list[str] = field(default_factory=list)  # names of classes without a box

    def lines(self) -> list[str]:
        """The findings in words, a line for each kind, after those of the scan."""
        kinds = (
            ("images that can't be decoded", self.undecodable),
            ("damaged images, used as far as they can be decoded", self.damaged),
            ("images with an EXIF orientation, which is applied", self.rotated),
            ("grey images, made RGB", self.grey),
            ("images with alpha, which is dropped", self.alpha),
            ("CMYK images, made RGB", self.cmyk),
            ("images of 16 bits a channel, made 8", self.sixteen_bit),
            ("images with the pixels of another one", self.same_pixels),
            ("images that another split has too", self.also_elsewhere),
            ("label files without an image", self.stray_labels),
            ("classes without a box", self.unseen_classes),
        )
        name = self.scan.split
        return self.scan.lines() + [f"{name}: {len(names)} {what}: {shorten(names)}" for what, names in kinds if names]

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain values."""
        return asdict(self)


def check_splits(spec: DataSpec, names: Sequence[str]) -> list[SplitCheck]:
    """Look at every image of these splits. Raises InputError where a split can't be found; whatever else is wrong is in the reports."""
    checks = []
    first_with: dict[bytes, tuple[str, str]] = {}  # pixels -> split, image
    for name in names:
        split = scan_split(spec, name, strict=False)
        check = SplitCheck(split.report)
        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(_look, split.image_paths))
        for image, (kinds, pixels) in zip(split.relative_paths, looks, strict=True):
            for kind in kinds:
                getattr(check, kind).append(image)
            if pixels:
                where, other = first_with.setdefault(pixels, (name, image))
                if where != name and other != image:
                    check.also_elsewhere.append(f"{image} = {other} of {where}")
                elif where != name:
                    check.also_elsewhere.append(f"{image} of {where}")
                elif other != image:
                    check.same_pixels.append(f"{image} = {other}")
        check.stray_labels = _stray_labels(spec, name)
        check.unseen_classes = _unseen(split)
        checks.append(check)
    return checks


def _look(image: Path) -> tuple[list[str], bytes | None]:
    """The kinds of findings of an image, and a hash of its pixels as the network would see them."""
    try:
        data = image.read_bytes()
        form = image_form(data)
        pixels = decode_image(data)
    except (OSError, DecodeError):
        return ["undecodable"], None
    told = {
        "damaged": is_damaged(data),
        "rotated": form.orientation != 1,
        "grey": form.channels <= 2,
        "alpha": form.channels in (2, 4) and not form.jpeg,
        "cmyk": form.channels == 4 and form.jpeg,
        "sixteen_bit": form.bits > 8,
    }
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.data)
    return [kind for kind, found in told.items() if found], digest.digest()


def _stray_labels(spec: DataSpec, name: str) -> list[str]:
    """Label files that lie among a split's, but belong to no image there; of splits that are folders, where they may only have been mistaken."""
    folders = [source for source in spec.splits[name] if source.is_dir()]
    images = [image for image in spec.image_files(name) if any(image.is_relative_to(folder) for folder in folders)]
    expected = defaultdict(set)
    for image in images:
        expected[label_path(image).parent].add(label_path(image).name)
    beside = {image.parent for image in images} & set(expected)  # labels among images: a text there may be anything
    found = (file for folder, names in expected.items() if folder not in beside for file in _texts(folder) if file.name not in names)
    return sorted(spec.relative(file) for file in found)


def _texts(folder: Path) -> Iterable[Path]:
    return folder.glob("*.txt") if folder.is_dir() else ()


def _unseen(split: Split) -> list[str]:
    seen = np.unique(np.concatenate([np.zeros((0, 5), np.float32), *split.labels])[:, 0]).astype(int)
    return [name for index, name in split.names.items() if index not in seen]
