"""Pascal VOC and COCO data sets -> YOLO folders with a data.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from horoyolo.config import InputError
from horoyolo.data.coco import read_coco
from horoyolo.data.folder import FolderReport, FolderWriter, PixelBox, new_folder
from horoyolo.data.spec import IMAGE_SUFFIXES, SPLITS


@dataclass
class _Annotated:
    """An image and its objects, before classes have numbers."""

    name: str  # below images/<split>/
    file: Path
    objects: list[tuple[str, float, float, float, float]]  # class name, x1, y1, x2, y2 in pixels
    num_skipped: int = 0  # crowds, difficult objects


def convert_voc(source: str | Path, out: str | Path, names: Sequence[str] | None = None) -> FolderReport:
    """Convert a Pascal VOC folder (Annotations, JPEGImages, ImageSets/Main/{train,val,test}.txt).

    Pixel coordinates are taken as given, clipped to the image; objects marked difficult are left out, as YOLOv5 does. Classes are in
    alphabetical order unless `names` are given. Raises InputError, with nothing written, for what is missing or can't be read.
    """
    source = Path(source)
    lists = {split: source / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    lists = {split: file for split, file in lists.items() if file.is_file()}
    if not lists:
        raise InputError(f"{source} is not a Pascal VOC folder: it has no ImageSets/Main/train.txt, val.txt or test.txt")
    images = {file.stem: file for file in sorted((source / "JPEGImages").glob("*")) if file.suffix.lower() in IMAGE_SUFFIXES}
    splits = {}
    for split, file in lists.items():
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise InputError(f"{file} is not UTF-8; names of images in UTF-8, one a line, are wanted") from None
        # A class's own list, as VOC has them too, adds 1 or -1 behind the name; a name may have spaces.
        stems = [line if line in images else line.split()[0] for line in lines]
        missing = [stem for stem in stems if stem not in images]
        if missing:
            raise InputError(f"{file} lists {missing[0]}, but there is no such image in {source / 'JPEGImages'}")
        splits[split] = [_read_voc(images[stem], source / "Annotations" / f"{stem}.xml") for stem in stems]
    return _write(splits, Path(out), names)


def convert_coco(annotations: str | Path, images: str | Path, out: str | Path, names: Sequence[str] | None = None) -> FolderReport:
    """Convert a COCO instances file, or all *.json files of a folder, whose images lie below `images`.

    A file's name says its split (`val` or `test` in it; else train). Crowds are left out. Classes are in alphabetical order unless `names`
    are given. Raises InputError, with nothing written, for what is missing or can't be read.
    """
    source = Path(annotations)
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{source} holds no .json file; give a COCO instances file or a folder of them")
    splits: dict[str, list[_Annotated]] = {}
    categories: set[str] = set()
    for file in files:
        split = next((split for split in ("val", "test") if split in file.stem.lower()), "train")
        if split in splits:
            raise InputError(f"{source}: two files for the {split} split, {file.name} the second; give one for each")
        splits[split], found = _read_coco(file, Path(images))
        categories |= found
    ordered = {split: splits[split] for split in SPLITS if split in splits}
    return _write(ordered, Path(out), names or sorted(categories))


def _write(splits: dict[str, list[_Annotated]], out: Path, names: Sequence[str] | None) -> FolderReport:
    used = {name for images in splits.values() for image in images for name, *_ in image.objects}
    names = list(names or sorted(used))
    unknown = sorted(used - set(names))
    if unknown:
        raise InputError(f"class {unknown[0]!r} of the annotations is not among the names given: {', '.join(names)}")
    if not names:
        raise InputError(f"nothing to convert to {out}: the annotations have no objects")
    class_ids = {name: index for index, name in enumerate(names)}
    with new_folder(out) as folder:
        writer = FolderWriter(folder, names, splits)
        for split, images in splits.items():
            for image in images:
                boxes: list[PixelBox] = [(class_ids[name], *corners) for name, *corners in image.objects]  # type: ignore[misc]
                writer.add(split, image.name, image.file.read_bytes(), boxes)
                writer.report.skipped += [image.name] * image.num_skipped
        writer.finish()
    return writer.report


def _read_voc(image: Path, annotation: Path) -> _Annotated:
    if not annotation.is_file():
        return _Annotated(image.name, image, [])
    objects = []
    num_skipped = 0
    try:
        for item in _parse_xml(annotation.read_bytes()).iter("object"):
            if (item.findtext("difficult") or "0").strip() == "1":
                num_skipped += 1
                continue
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax"))
            objects.append(((item.findtext("name") or "").strip(), x1, y1, x2, y2))
    except (ElementTree.ParseError, expat.ExpatError, ValueError) as error:
        raise InputError(f"{annotation} is not a readable Pascal VOC annotation: {error}") from None
    return _Annotated(image.name, image, objects, num_skipped)


def _parse_xml(data: bytes) -> ElementTree.Element:
    """Parse XML that declares no document type: entities, which could blow up or read other files, can't be defined without one."""

    def refuse(*_: Any) -> None:
        raise ValueError("document type declarations are not accepted")

    checker = expat.ParserCreate()
    checker.StartDoctypeDeclHandler = refuse
    checker.Parse(data, True)
    return ElementTree.fromstring(data)


def _read_coco(file: Path, folder: Path) -> tuple[list[_Annotated], set[str]]:
    """The images of an instances file and the names of its categories."""
    content = read_coco(file)
    missing = [image.name for image in content.images if not (folder / image.name).is_file()]
    if missing:
        raise InputError(f"{file} lists {missing[0]}, but there is no such image in {folder}")
    images = [_Annotated(image.name, folder / image.name, list(image.objects), image.crowds) for image in content.images]
    return images, set(content.categories)
