"""The layout of a copy: whatever a data.yaml names, the copy holds the same samples and its hash is known beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from horoyolo.config import InputError
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.data.staging import describe_content, plan_layout

JPEG = simplejpeg.encode_jpeg(np.zeros((48, 64, 3), np.uint8))


def write_image(image: Path, label: Path | None, boxes: int = 1) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(JPEG)
    if label:
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(f"0 0.5 0.5 0.{at + 1} 0.2\n" for at in range(boxes)))


def folders(root: Path) -> None:
    """Images and labels in folders of their own, as YOLOv5 documents it; one image without labels, one corrupt."""
    for split, stem in (("train", "a"), ("train", "b"), ("val", "c")):
        write_image(root / f"set/images/{split}/{stem}.jpg", root / f"set/labels/{split}/{stem}.txt", boxes=2)
    write_image(root / "set/images/train/background.jpg", None)
    (root / "set/images/train/corrupt.jpg").write_bytes(b"nothing")
    (root / "data.yaml").write_text("path: set\ntrain: images/train\nval: images/val\ntest: images/missing\nnames: [x]\n")


def lists(root: Path) -> None:
    """List files, an image twice, labels beside the images, folders whose name has a space."""
    for stem in ("a", "b", "c"):
        write_image(root / f"my set/{stem}.jpg", root / f"my set/{stem}.txt")
    (root / "my set/train.txt").write_text("./a.jpg\n./b.jpg\n./a.jpg\n")
    (root / "my set/val.txt").write_text("c.jpg\n")
    (root / "data.yaml").write_text("path: my set\ntrain: train.txt\nval: val.txt\nnames: [x]\n")


def two_places(root: Path) -> None:
    """A list of folders that lie apart, one with labels beside the images, the same file names in both."""
    write_image(root / "one/images/a.jpg", root / "one/labels/a.txt", boxes=3)
    write_image(root / "two/a.jpg", root / "two/a.txt")
    write_image(root / "two/val/b.jpg", root / "two/val/b.txt")
    (root / "data.yaml").write_text("path: one\ntrain: [images, ../two]\nval: ../two/val\nnames: [x]\n")


def links(root: Path) -> None:
    """A folder that is a link, and an image that is one."""
    write_image(root / "store/images/a.jpg", root / "store/labels/a.txt")
    write_image(root / "store/images/b.jpg", root / "store/labels/b.txt")
    (root / "images").mkdir()
    (root / "images/train").symlink_to(root / "store/images", target_is_directory=True)
    (root / "labels").mkdir()
    (root / "labels/train").symlink_to(root / "store/labels", target_is_directory=True)
    (root / "images/val").mkdir()
    (root / "images/val/v.jpg").symlink_to(root / "store/images/a.jpg")
    write_image(root / "elsewhere.jpg", root / "labels/val/v.txt")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [x]\n")


def copy_out(yaml: Path, target: Path) -> str:
    """Write a copy by its layout; the expected hash."""
    layout = plan_layout(load_data_spec(yaml))
    for name, source in layout.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)
    for name, text in layout.texts.items():
        (target / name).write_text(text)
    assert layout.num_bytes == sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return layout.hash


# Above a copy there may be a folder called images: it must not decide where labels are looked for.
@pytest.mark.parametrize("place", ["copy", "images/copy"])
@pytest.mark.parametrize("write", [folders, lists, two_places, links])
def test_a_copy_holds_the_same_samples(write: Callable[[Path], None], place: str, tmp_path: Path) -> None:
    write(tmp_path / "source")
    yaml = tmp_path / "source" / "data.yaml"
    expected = copy_out(yaml, tmp_path / place)
    spec, copied = load_data_spec(yaml), load_data_spec(tmp_path / place / "data.yaml")
    for name in ("train", "val"):
        here, there = scan_split(spec, name), scan_split(copied, name)
        assert len(here) == len(there) > 0
        assert all(np.array_equal(a, b) for a, b in zip(here.labels, there.labels, strict=True))
        assert [path.name for path in here.image_paths] == [path.name for path in there.image_paths]
        assert all(path.resolve().is_relative_to(tmp_path / place) for path in there.image_paths)
    assert copied.names == spec.names
    assert describe_content(scan_split(copied, name) for name in ("train", "val"))["hash"] == expected


def test_the_hash_covers_labels_sizes_and_class_names(tmp_path: Path) -> None:
    folders(tmp_path)
    yaml = tmp_path / "data.yaml"

    def content_hash() -> str:
        return plan_layout(load_data_spec(yaml)).hash

    seen = [content_hash(), content_hash()]
    assert seen[0] == seen[1]
    (tmp_path / "set/labels/train/a.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    seen.append(content_hash())
    with (tmp_path / "set/images/train/b.jpg").open("ab") as stream:
        stream.write(b"more")
    seen.append(content_hash())
    yaml.write_text(yaml.read_text().replace("[x]", "[y]"))
    seen.append(content_hash())
    assert len(set(seen)) == 4


def test_the_name_says_which_data_set_it_is_and_is_plain(tmp_path: Path) -> None:
    folders(tmp_path / "blood cells; rm")
    layout = plan_layout(load_data_spec(tmp_path / "blood cells; rm" / "data.yaml"))
    assert layout.name == f"blood_cells__rm-{layout.hash[:12]}"
    (tmp_path / "blood cells; rm" / "data.yaml").rename(tmp_path / "blood cells; rm" / "bccd.yaml")
    assert plan_layout(load_data_spec(tmp_path / "blood cells; rm" / "bccd.yaml")).name == f"bccd-{layout.hash[:12]}"


def test_names_that_no_list_can_hold_are_refused(tmp_path: Path) -> None:
    folders(tmp_path)
    write_image(tmp_path / "set/images/train/a\nb.jpg", None)
    with pytest.raises(InputError, match="a line break in it"):
        plan_layout(load_data_spec(tmp_path / "data.yaml"))
