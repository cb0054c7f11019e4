"""A YOLOv5 data.yaml and the image files that it names, in folders, list files or COCO instances files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horoyolo.config import InputError, read_yaml
from horoyolo.data.coco import CocoFile, CocoImage, read_coco

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
SPLITS = ("train", "val", "test")
JSON = ".json"


@dataclass(frozen=True)
class DataSpec:
    """What a data.yaml says; the folders and list files of a split are looked into by `image_files`."""

    file: Path
    root: Path  # the data set's folder; names of images in reports and hashes are relative to it
    splits: dict[str, list[Path]]  # folders, list files and COCO instances files
    names: dict[int, str]  # as labels have them
    num_classes: int
    download: str = ""  # YOLOv5's key: quoted when images are missing, never run
    image_folders: dict[str, Path] = field(default_factory=dict)  # where a split's COCO images lie, where the yaml says it
    single_cls: bool = False  # all objects are of one class, whatever their labels say

    @property
    def classes(self) -> dict[int, str]:
        """The classes that are told apart; with ``single_cls`` one, which has YOLOv5's name for it unless the data set has its own."""
        return {0: "item"} if self.single_cls and self.num_classes > 1 else self.names

    def image_files(self, split: str) -> list[Path]:
        """All image files of a split, sorted. Raises InputError when the split isn't listed, a folder is missing or there are no images."""
        if split not in self.splits:
            raise InputError(f"{self.file} has no `{split}` split; it lists {', '.join(self.splits)}")
        sources = self.splits[split]
        for source in sources:
            if not source.exists():
                raise InputError(f"{self.file}: `{split}` names {source}, which doesn't exist{self._download_hint()}")
        files = sorted(file for source in sources for file in self._images_in(split, source))
        for file in files:
            try:
                str(file).encode()
            except UnicodeEncodeError:
                raise InputError(f"{os.fsencode(file)!r} (`{split}` of {self.file}): the file's name is not UTF-8; another one is wanted") from None
        if not files:
            where = ", ".join(str(source) for source in sources)
            raise InputError(f"no images found for `{split}` in {where}{self._download_hint()}")
        return files

    def splits_to_look_at(self) -> list[str]:
        """All splits; `test`, which training does not read, where it is there: many a data.yaml names one that comes separately."""
        return [name for name, sources in self.splits.items() if name != "test" or all(source.exists() for source in sources)]

    def annotations(self, split: str) -> dict[Path, tuple[CocoImage, Path]]:
        """The images of a split whose labels are in COCO instances files, each with its file; those of label files are not among them."""
        found: dict[Path, tuple[CocoImage, Path]] = {}
        for source in self.splits.get(split, []):
            if source.suffix == JSON:
                content = read_coco(source)
                unknown = sorted(set(content.categories) - set(self.names.values()))
                if unknown and not self.single_cls:
                    raise InputError(f"{source}: category {unknown[0]!r} is not among the `names` of {self.file}")
                folder = self._image_folder(split, source, content)
                for image in content.images:
                    file = _absolute(folder / image.name)
                    if file in found:
                        raise InputError(f"{source} lists {image.name}, which {found[file][1]} lists already: one entry with all boxes is wanted")
                    found[file] = image, source
        return found

    def _images_in(self, split: str, source: Path) -> Iterable[Path]:
        if source.suffix != JSON:
            return _images_in(source, self.root)
        content = read_coco(source)
        folder = self._image_folder(split, source, content)
        return (_absolute(folder / image.name) for image in content.images)

    def _image_folder(self, split: str, source: Path, content: CocoFile) -> Path:
        """Where the images of an instances file lie: as the yaml's `images` says, or in the first of the usual places that has the first one."""
        if split in self.image_folders:
            return self.image_folders[split]
        name = source.stem.removeprefix("instances_")  # instances_train2017.json: train2017
        folders = [base / folder for base in (self.root, self.root / "images", source.parent) for folder in (name, split, "")]
        folder = next((folder for folder in folders if content.images and (folder / content.images[0].name).is_file()), None)
        if folder is None:
            first = content.images[0].name if content.images else "no image"
            where = f"which is in none of the usual places below {self.root}; `images: FOLDER` in {self.file} says where"
            raise InputError(f"{source} lists {first}, {where}")
        return folder

    def relative(self, file: Path) -> str:
        """A file's name as reports and hashes show it: relative to the data set's folder, with forward slashes."""
        return Path(os.path.relpath(file, self.root)).as_posix()

    def _download_hint(self) -> str:
        return "; its `download` key isn't run here: fetch the data set first" if self.download else ""


def load_data_spec(path: str | Path, single_cls: bool = False) -> DataSpec:
    """Read a YOLOv5 data.yaml as it is; ``single_cls``: all objects are taken as of one class.

    A relative `path` is looked for in the current folder, the yaml's folder and the folder above that, in this order; the first that holds
    one of the splits is taken. Raises InputError for a file that is missing or isn't yaml, for missing or unfit `names`, for an `nc` that
    disagrees with them, and where no split is given.
    """
    file = Path(path)
    content = read_yaml(file, "a YOLOv5 data.yaml with train, val and names")
    entries = {split: _entries(file, split, content[split]) for split in SPLITS if content.get(split)}
    if not entries:
        raise InputError(f"{file} lists no images; it must have `train` and `val`, each a folder, a list file or a list of them")
    root = _root(file, str(content.get("path") or ""), [entry for split in entries.values() for entry in split])
    splits = {split: [_locate(root, entry) for entry in split_entries] for split, split_entries in entries.items()}
    names = _names(file, content, splits)
    folders = content.get("images") or {}
    given = folders if isinstance(folders, dict) else dict.fromkeys(splits, folders)
    image_folders = {split: _locate(root, str(folder)) for split, folder in given.items()}
    return DataSpec(file, root, splits, names, len(names), str(content.get("download") or ""), image_folders, single_cls)


def _names(file: Path, content: dict[str, Any], splits: dict[str, list[Path]]) -> dict[int, str]:
    names = content.get("names")
    annotated = next((source for sources in splits.values() for source in sources if source.suffix == JSON), None)
    if names is None and annotated is not None:
        names = list(read_coco(annotated).categories)
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise InputError(f"{file} has no class names; `names` must be a list or a mapping from 0, 1, ... to names")
    if set(names) != set(range(len(names))):
        raise InputError(f"{file}: the keys of `names` must be 0 to {len(names) - 1}, not {', '.join(map(str, names))}")
    num_classes = content.get("nc", len(names))
    if num_classes != len(names):
        raise InputError(f"{file}: nc is {num_classes} but `names` has {len(names)} classes; they must agree")
    return {index: str(names[index]) for index in range(len(names))}


def _entries(file: Path, split: str, value: object) -> list[str]:
    entries: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise InputError(f"{file}: `{split}` must be a folder, a list file or a list of them, not {value!r}")
    return entries


def _root(file: Path, path: str, entries: list[str]) -> Path:
    folder = _absolute(file).parent
    if path:
        given = Path(path).expanduser()
        candidates = [given] if given.is_absolute() else [Path.cwd() / given, folder / given, folder.parent / given]
    else:
        candidates = [folder, Path.cwd()]
    with_images = (root for root in candidates if any(_locate(root, entry).exists() for entry in entries))
    existing = (root for root in candidates if root.is_dir())
    return _absolute(next(with_images, None) or next(existing, None) or candidates[0])


def _locate(root: Path, entry: str) -> Path:
    """An entry below the root; one that starts with ../ may, as many exported data sets have it, mean the root itself."""
    found = root / Path(entry).expanduser()
    if entry.startswith("../") and not found.exists() and (root / entry[3:]).exists():
        found = root / entry[3:]
    return _absolute(found)


def _images_in(source: Path, root: Path) -> Iterable[Path]:
    if source.is_dir():
        files: Iterable[Path] = _visible_files(source)
    else:
        lines = (line.strip() for line in source.read_text(encoding="utf-8-sig", errors="replace").splitlines())
        files = (_listed(line, source.parent, root) for line in lines if line)
    return (file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def _visible_files(source: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones, as a glob has them: what editors and file managers leave beside images is no data."""
    for folder, folders, names in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _listed(line: str, folder: Path, root: Path) -> Path:
    """A line of a list file: ./ is the list's own folder; other relative names lie below the root, that folder or the current one."""
    if line.startswith("./"):
        return _absolute(folder / line)
    candidates = [_absolute(base / line) for base in (root, folder, Path.cwd())]
    return next((file for file in candidates if file.exists()), candidates[0])


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # unlike resolve(), keeps links: labels lie beside the images' given name
