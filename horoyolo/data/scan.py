"""Look at every image and label of a split once: what is usable, what isn't, and why."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from horoyolo.config import InputError
from horoyolo.data import cache
from horoyolo.data.decode import DecodeError, image_hw
from horoyolo.data.labels import label_path, parse_labels
from horoyolo.data.spec import DataSpec

NAMES_SHOWN = 5  # per line of a printed report; the report itself has all


@dataclass
class ScanReport:
    """What a scan found; the lists hold names relative to the data set's folder, with the line where it is one line's fault."""

    split: str
    images: int = 0  # usable
    boxes: int = 0  # usable
    missing_labels: list[str] = field(default_factory=list)  # used as background
    empty_labels: list[str] = field(default_factory=list)  # used as background
    corrupt_images: list[str] = field(default_factory=list)  # left out
    corrupt: list[str] = field(default_factory=list)  # this and the next three: lines dropped
    out_of_range: list[str] = field(default_factory=list)
    zero_area: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in words, a line for each kind of finding."""
        kinds = (
            ("images without a label file, used as background", self.missing_labels),
            ("images with an empty label file, used as background", self.empty_labels),
            ("corrupt images left out", self.corrupt_images),
            ("corrupt label lines dropped", self.corrupt),
            ("label lines with coordinates out of range dropped", self.out_of_range),
            ("boxes without area dropped", self.zero_area),
            ("duplicate label lines dropped", self.duplicate),
        )
        found = [f"{self.split}: {len(names)} {what}: {shorten(names)}" for what, names in kinds if names]
        return [f"{self.split}: {self.images} images, {self.boxes} boxes", *found]


@dataclass(frozen=True)
class Split:
    """The usable images of a split and their labels, in sorted order."""

    name: str
    root: Path
    image_paths: list[Path]
    shapes_hw: np.ndarray  # (n, 2) int32, pixels, upright
    labels: list[np.ndarray]  # n of (m, 5) float32: class, box_xywhn
    names: dict[int, str]
    report: ScanReport
    relative_paths: list[str]

    def __len__(self) -> int:
        return len(self.image_paths)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over relative names, image sizes and labels: the same on every host that has the same data."""
        digest = hashlib.sha256()
        for name, shape, labels in zip(self.relative_paths, self.shapes_hw, self.labels, strict=True):
            digest.update(f"{name}\0{shape[0]} {shape[1]} {len(labels)}\0".encode())
            digest.update(labels.astype("<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Scanned:
    """One image's part of the scan."""

    hw: tuple[int, int]
    labels: np.ndarray  # (m, 5)
    findings: list[tuple[str, str]]  # field of ScanReport, name


def scan_split(spec: DataSpec, split: str) -> Split:
    """Check every image and label file of a split, from the cache where these files were seen before.

    Raises InputError when the split is missing, has no usable image, no box at all, or a class id beyond the number of classes.
    """
    files = spec.image_files(split)
    names = [spec.relative(file) for file in files]
    folders = cache.folders(spec.root)
    key = cache.content_key(names, files, [label_path(file) for file in files])
    found = _load(cache.load(folders, split, key), spec)
    if found is None:
        with ThreadPoolExecutor() as pool:
            scanned = list(pool.map(partial(_scan_image, spec), files))
        found = _gather(split, scanned)
        cache.save(folders, split, key, _to_arrays(*found))
    kept, shapes_hw, labels, report = found
    if not len(kept):
        raise InputError(f"no images found for `{split}` of {spec.file} that can be read: all {len(files)} are corrupt, {names[0]} first")
    if not report.boxes:
        raise InputError(f"no labels at all for `{split}` of {spec.file}: the first were looked for in {label_path(files[kept[0]])}")
    return Split(split, spec.root, [files[i] for i in kept], shapes_hw, labels, spec.names, report, [names[i] for i in kept])


def shorten(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _scan_image(spec: DataSpec, image: Path) -> _Scanned:
    nothing = np.zeros((0, 5), np.float32)
    try:
        hw = image_hw(image)
    except DecodeError:
        return _Scanned((0, 0), nothing, [("corrupt_images", spec.relative(image))])
    file = label_path(image)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _Scanned(hw, nothing, [("missing_labels", spec.relative(image))])
    labels, lines, problems = parse_labels(text)
    beyond = np.flatnonzero(labels[:, 0] >= spec.num_classes)
    if len(beyond):
        first = beyond[0]
        known = f"0 to {spec.num_classes - 1}"
        raise InputError(f"{file}, line {lines[first]}: class {labels[first, 0]:g} is beyond the classes of {spec.file}, which are {known}")
    findings = [(problem.kind, f"{spec.relative(file)}:{problem.line} ({problem.reason})") for problem in problems]
    if not text.strip():
        findings.append(("empty_labels", spec.relative(image)))
    return _Scanned(hw, labels, findings)


_Found = tuple[np.ndarray, np.ndarray, list[np.ndarray], ScanReport]  # kept (n,), shapes_hw (n, 2), labels, report


def _gather(split: str, scanned: list[_Scanned]) -> _Found:
    report = ScanReport(split)
    for kind, name in (finding for image in scanned for finding in image.findings):
        getattr(report, kind).append(name)
    kept = np.array([i for i, image in enumerate(scanned) if image.hw != (0, 0)], np.int64)
    shapes_hw = np.array([scanned[i].hw for i in kept], np.int32).reshape(-1, 2)
    labels = [scanned[i].labels for i in kept]
    report.images = len(kept)
    report.boxes = sum(map(len, labels))
    return kept, shapes_hw, labels, report


def _to_arrays(kept: np.ndarray, shapes_hw: np.ndarray, labels: Iterable[np.ndarray], report: ScanReport) -> dict[str, np.ndarray]:
    labels = list(labels)
    return {
        "kept": kept,
        "shapes_hw": shapes_hw,
        "counts": np.array([len(boxes) for boxes in labels], np.int64),
        "labels": np.concatenate([np.zeros((0, 5), np.float32), *labels]),
        "report": cache.json_array(dataclasses.asdict(report)),
    }


def _load(arrays: dict[str, np.ndarray] | None, spec: DataSpec) -> _Found | None:
    """A cached scan; none when a label's class is beyond the present names, so that the scan anew can say which line it is."""
    if arrays is None or (len(arrays["labels"]) and arrays["labels"][:, 0].max() >= spec.num_classes):
        return None
    labels = np.split(arrays["labels"], np.cumsum(arrays["counts"])[:-1]) if len(arrays["counts"]) else []
    return arrays["kept"], arrays["shapes_hw"], labels, ScanReport(**cache.parse_json(arrays["report"]))
