"""Look at every image and label of a split once: what is usable, what isn't, and why."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from horoyolo.config import InputError
from horoyolo.data import cache
from horoyolo.data.cache import Beat, nothing
from horoyolo.data.coco import CocoImage
from horoyolo.data.decode import DecodeError, image_hw
from horoyolo.data.labels import label_path, parse_labels, parse_outlines
from horoyolo.data.spec import DataSpec

MANY = 8192  # images for which it pays to start processes
ABSENT = (FileNotFoundError, NotADirectoryError)
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
    corrupt: list[str] = field(default_factory=list)  # this and the next three: lines dropped, or files that can't be read
    out_of_range: list[str] = field(default_factory=list)
    zero_area: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    unknown_class: list[str] = field(default_factory=list)  # no split with one of these is trained on
    other_size: list[str] = field(default_factory=list)  # COCO: the image's size is not the annotated one; used as it is
    crowds: list[str] = field(default_factory=list)  # COCO: images with boxes marked as crowds, which are left out

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
            ("label lines with an unknown class", self.unknown_class),
            ("images of another size than annotated", self.other_size),
            ("images with crowds, which are left out", self.crowds),
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
    outlines: list[list[np.ndarray]] = field(default_factory=list)  # n of m of (k, 2), normalised x and y, k = 0 for a box; or none of any

    def __len__(self) -> int:
        return len(self.image_paths)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over relative names, image sizes and labels: the same on every host that has the same data."""
        digest = hashlib.sha256()
        for name, shape, labels in zip(self.relative_paths, self.shapes_hw, self.labels, strict=True):
            digest.update(f"{name}\0{shape[0]} {shape[1]} {len(labels)}\0".encode())
            digest.update(labels.astype("<f4").tobytes())
        for outline in (outline for image in self.outlines for outline in image):
            digest.update(outline.astype("<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Scanned:
    """One image's part of the scan."""

    hw: tuple[int, int]
    labels: np.ndarray  # (m, 5)
    findings: list[tuple[str, str]]  # field of ScanReport, name
    is_lasting: bool = True  # False: a file is there but could not be read, which may be otherwise next time, by the same file
    outlines: list[np.ndarray] = field(default_factory=list)  # m of (k, 2), or none


def scan_split(spec: DataSpec, split: str, strict: bool = True, beat: Beat = nothing) -> Split:
    """Check every image and label file of a split, from the cache where these files were seen before.

    Of processes that ask at the same time one looks and the others find what it found; all of them call ``beat`` again and again. Raises
    InputError when the split is missing, and, if ``strict``, when it has no usable image, no box at all, or a class id beyond the number of classes.
    """
    files = spec.image_files(split)
    annotated = spec.annotations(split)
    names = [spec.relative(file) for file in files]
    folders = cache.folders(spec.root)
    sources = [annotated[file][1] if file in annotated else label_path(file) for file in files]
    # Label files hold numbers of classes, annotations what `names` turns into numbers.
    classes = "any" if spec.single_cls else repr(sorted(spec.names.items())) if annotated else str(spec.num_classes)
    key = cache.content_key(names, files, sources, classes)
    found = _load(cache.load(folders, split, key))
    if found is None:
        with cache.one_at_a_time(folders, beat):
            found = _load(cache.load(folders, split, key))
            if found is None:
                images = [(file, annotated[file][0] if file in annotated else None) for file in files]
                scanned = _scan_all(spec, images, beat)
                found = _gather(split, scanned)
                if all(image.is_lasting for image in scanned):
                    cache.save(folders, split, key, _to_arrays(*found))
    kept, shapes_hw, labels, outlines, report = found
    if strict:
        if not len(kept):
            raise InputError(f"no images found for `{split}` of {spec.file} that can be read: all {len(files)} are corrupt, {names[0]} first")
        if report.unknown_class:
            known = f"0 to {spec.num_classes - 1}"
            first = report.unknown_class[0].removesuffix(")").replace(" (", ": ")
            raise InputError(f"{first} is beyond the classes of {spec.file}, which are {known}; data check lists all such lines")
        if not report.boxes:
            first = report.corrupt[0] if report.corrupt else f"the first were looked for in {sources[kept[0]]}"
            raise InputError(f"no labels at all for `{split}` of {spec.file}: {first}")
    if spec.single_cls:
        for rows in labels:
            rows[:, 0] = 0
    relative = [names[i] for i in kept]
    return Split(split, spec.root, [files[i] for i in kept], shapes_hw, labels, spec.classes, report, relative, outlines)


def shorten(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _scan_all(spec: DataSpec, images: list[tuple[Path, CocoImage | None]], beat: Beat) -> list[_Scanned]:
    """Scan images, each with its annotation if it has one, on all cores: in processes where there are many, since reading markers is Python."""
    look = partial(_scan_image, spec)
    cores = len(os.sched_getaffinity(0))
    if len(images) >= MANY and cores > 1:
        # Started from scratch: neither a fork of a process in which MPI may run, nor a fork server that is to load other modules.
        with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as processes:
            try:
                return _listed(processes.map(look, images, chunksize=256), beat)
            except BrokenProcessPool:  # killed for memory, say
                pass
    with ThreadPoolExecutor() as pool:
        return _listed(pool.map(look, images), beat)


def _listed(scanned: Iterable[_Scanned], beat: Beat) -> list[_Scanned]:
    found = []
    for image in scanned:
        found.append(image)
        beat()
    return found


def _scan_image(spec: DataSpec, source: tuple[Path, CocoImage | None]) -> _Scanned:
    image, annotated = source
    nothing = np.zeros((0, 5), np.float32)
    try:
        hw = image_hw(image)
    except DecodeError as error:
        cause = error.__cause__
        is_lasting = not isinstance(cause, OSError) or isinstance(cause, ABSENT)
        return _Scanned((0, 0), nothing, [("corrupt_images", spec.relative(image))], is_lasting)
    if annotated is not None:
        return _scan_annotated(spec, image, hw, annotated)
    file = label_path(image)
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except ABSENT:
        return _Scanned(hw, nothing, [("missing_labels", spec.relative(image))])
    except OSError as error:
        return _Scanned(hw, nothing, [("corrupt", f"{spec.relative(file)} ({error.strerror})")], is_lasting=False)
    labels, lines, problems = parse_labels(text)
    findings = [(problem.kind, f"{spec.relative(file)}:{problem.line} ({problem.reason})") for problem in problems]
    known = (labels[:, 0] < spec.num_classes) | spec.single_cls
    for label, line in zip(labels[~known], lines[~known], strict=True):
        findings.append(("unknown_class", f"{spec.relative(file)}:{line} (class {label[0]:g})"))
    if not text.strip():
        findings.append(("empty_labels", spec.relative(image)))
    outlines = parse_outlines(text, lines[known])
    return _Scanned(hw, labels[known], findings, outlines=outlines if any(map(len, outlines)) else [])


def _scan_annotated(spec: DataSpec, image: Path, hw: tuple[int, int], annotated: CocoImage) -> _Scanned:
    """COCO boxes, clipped to their image."""
    name = spec.relative(image)
    class_ids = {category: index for index, category in spec.names.items()}
    findings = [("other_size", f"{name} ({hw[1]}x{hw[0]}, annotated {annotated.hw[1]}x{annotated.hw[0]})")] if annotated.hw not in (None, hw) else []
    findings += [("crowds", name)] * (annotated.crowds > 0) + [("empty_labels", name)] * (not annotated.objects)
    labels: list[tuple[float, ...]] = []
    for category, *corners in annotated.objects:
        x1, y1, x2, y2 = (min(max(value, 0.0), side) / side for value, side in zip(corners, (hw[1], hw[0]) * 2, strict=True))
        label = tuple(np.array((class_ids.get(category, 0), (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), np.float32).tolist())
        box = "x y x y = " + " ".join(f"{value:g}" for value in corners)
        if not all(math.isfinite(value) for value in corners):
            findings.append(("corrupt", f"{name} ({box})"))
        elif label[3] <= 0 or label[4] <= 0:
            findings.append(("zero_area", f"{name} ({box})"))
        elif label in labels:
            findings.append(("duplicate", f"{name} ({box})"))
        else:
            labels.append(label)
    return _Scanned(hw, np.array(labels, np.float32).reshape(-1, 5), findings)


# kept (n,), shapes_hw (n, 2), labels, outlines, report
_Found = tuple[np.ndarray, np.ndarray, list[np.ndarray], list[list[np.ndarray]], ScanReport]


def _gather(split: str, scanned: list[_Scanned]) -> _Found:
    report = ScanReport(split)
    for kind, name in (finding for image in scanned for finding in image.findings):
        getattr(report, kind).append(name)
    kept = np.array([i for i, image in enumerate(scanned) if image.hw != (0, 0)], np.int64)
    shapes_hw = np.array([scanned[i].hw for i in kept], np.int32).reshape(-1, 2)
    labels = [scanned[i].labels for i in kept]
    report.images = len(kept)
    report.boxes = sum(map(len, labels))
    outlines = [scanned[i].outlines or [np.zeros((0, 2), np.float32)] * len(scanned[i].labels) for i in kept]
    return kept, shapes_hw, labels, outlines if any(scanned[i].outlines for i in kept) else [], report


def _to_arrays(
    kept: np.ndarray, shapes_hw: np.ndarray, labels: list[np.ndarray], outlines: list[list[np.ndarray]], report: ScanReport
) -> dict[str, np.ndarray]:
    flat = [outline for image in outlines for outline in image]
    return {
        "kept": kept,
        "shapes_hw": shapes_hw,
        "counts": np.array([len(boxes) for boxes in labels], np.int64),
        "labels": np.concatenate([np.zeros((0, 5), np.float32), *labels]),
        "points": np.array([len(outline) for outline in flat], np.int64),
        "outlines": np.concatenate([np.zeros((0, 2), np.float32), *flat]),
        "report": cache.json_array(dataclasses.asdict(report)),
    }


def _load(arrays: dict[str, np.ndarray] | None) -> _Found | None:
    """A cached scan."""
    if arrays is None:
        return None
    labels = _split(arrays["labels"], arrays["counts"])
    outlines = _split(arrays["outlines"], arrays["points"])
    ends = np.cumsum(arrays["counts"])
    by_image = [outlines[end - count : end] for count, end in zip(arrays["counts"], ends, strict=True)] if outlines else []
    return arrays["kept"], arrays["shapes_hw"], labels, by_image, ScanReport(**cache.parse_json(arrays["report"]))


def _split(rows: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Rows in parts of these lengths."""
    return np.split(rows, np.cumsum(counts)[:-1]) if len(counts) else []
