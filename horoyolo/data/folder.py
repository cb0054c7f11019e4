"""A new data set in YOLO's layout, written beside its place and moved there when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml

from horoyolo.config import InputError
from horoyolo.data.decode import DecodeError, image_hw
from horoyolo.data.labels import label_path
from horoyolo.data.scan import shorten
from horoyolo.files import atomic_folder

PixelBox = tuple[int, float, float, float, float]  # class, x1, y1, x2, y2


@dataclass
class FolderReport:
    """What was written, and what wasn't; names are those of the images."""

    images: dict[str, int] = field(default_factory=dict)  # split -> number
    boxes: dict[str, int] = field(default_factory=dict)
    zero_area: list[str] = field(default_factory=list)  # once for each box dropped
    corrupt_images: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # what the source itself marks as not to be learned from: crowds, difficult objects

    def lines(self) -> list[str]:
        """The report in words, with the first few names of each kind."""
        kinds = (
            ("boxes without area dropped", self.zero_area),
            ("corrupt images left out", self.corrupt_images),
            ("boxes marked crowd or difficult left out", self.skipped),
        )
        written = [f"{split}: {count} images, {self.boxes[split]} boxes" for split, count in self.images.items()]
        return written + [f"{len(names)} {what}: {shorten(names)}" for what, names in kinds if names]


class FolderWriter:
    """Writes images/<split>/, labels/<split>/ and data.yaml below a folder."""

    def __init__(self, root: Path, names: Sequence[str], splits: Iterable[str]) -> None:
        self.root = root
        self.names = list(names)
        self.report = FolderReport()
        for split in splits:
            self.report.images[split] = self.report.boxes[split] = 0
            (root / "images" / split).mkdir(parents=True)
            (root / "labels" / split).mkdir(parents=True)

    def add(self, split: str, name: str, image: bytes, boxes: Iterable[PixelBox]) -> None:
        """Write an image file as it is and its boxes, clipped to it; corrupt images and boxes without area are reported instead.

        Raises InputError for a name that leads out of the folder or that shares its label file with an earlier one.
        """
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise InputError(f"image name {name!r} leads out of its folder; names must lie below it")
        try:
            hw = image_hw(image)
        except DecodeError:
            self.report.corrupt_images.append(name)
            return
        file = self.root / "images" / split / relative
        labels = label_path(file)
        if labels.exists():
            raise InputError(f"two images of {split} would share the label file of {name}; names must differ in more than the suffix")
        lines = [line for box in boxes if (line := self._label_line(name, box, hw))]
        for path in (file, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
        labels.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.report.images[split] += 1
        self.report.boxes[split] += len(lines)

    def finish(self) -> None:
        """Write data.yaml. Without a `val` split it names the first one there too, and without `train` likewise: YOLOv5 wants both."""
        splits = list(self.report.images)
        content: dict[str, object] = {split: f"images/{split if split in splits else splits[0]}" for split in ("train", "val")}
        content |= {split: f"images/{split}" for split in splits}
        content |= {"nc": len(self.names), "names": dict(enumerate(self.names))}
        (self.root / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def _label_line(self, name: str, box: PixelBox, hw: tuple[int, int]) -> str:
        height, width = hw
        class_id, *corners = box
        x1, x2 = (min(max(x, 0.0), width) / width for x in corners[0::2])
        y1, y2 = (min(max(y, 0.0), height) / height for y in corners[1::2])
        if not (x2 > x1 and y2 > y1):
            self.report.zero_area.append(name)
            return ""
        return f"{class_id} {(x1 + x2) / 2:.8f} {(y1 + y2) / 2:.8f} {x2 - x1:.8f} {y2 - y1:.8f}"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, moved to `out` at the end and removed if anything goes wrong. Raises InputError where `out` exists or can't be."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists; choose a folder that doesn't")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} can't be made: {error.strerror}; choose another folder") from None
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out} can't be made: {out.parent} can't be written to; choose another folder")
    with atomic_folder(out) as folder:
        yield folder
