"""COCO instances files used as they are: the same samples as from a converted copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from horoyolo.config import InputError
from horoyolo.data.convert import convert_coco
from horoyolo.data.scan import Split, scan_split
from horoyolo.data.spec import DataSpec, load_data_spec
from horoyolo.data.staging import plan_layout

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
IMAGES = [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}, {"id": 2, "file_name": "below/b.png", "height": 40, "width": 60}]
BOXES = [
    {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 5, 20, 30]},
    {"id": 2, "image_id": 1, "category_id": 3, "bbox": [50.25, 0, 20, 10]},  # reaches over the border
    {"id": 3, "image_id": 2, "category_id": 3, "bbox": [1, 1, 8, 8]},
]


def write_set(root: Path, boxes: list[dict[str, Any]] = BOXES, images: str = "images/val2017", **content: Any) -> DataSpec:
    for image in IMAGES:
        file = root / images / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.random.default_rng(image["id"]).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    (root / "annotations").mkdir(exist_ok=True)
    instances = {"categories": CATEGORIES, "images": IMAGES, "annotations": boxes}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(instances))
    entries = dict.fromkeys(("train", "val"), "annotations/instances_val2017.json")
    (root / "data.yaml").write_text(yaml.safe_dump(entries | content))
    return load_data_spec(root / "data.yaml")


def labels(split: Split) -> dict[str, list[list[float]]]:
    return {file.name: rows.tolist() for file, rows in zip(split.image_paths, split.labels, strict=True)}


def test_used_directly_it_gives_what_a_converted_copy_gives(tmp_path: Path) -> None:
    spec = write_set(tmp_path / "set")
    assert spec.names == {0: "cat", 1: "dog"}  # by their ids, as in the lists that go with public weights
    direct = scan_split(spec, "train")
    convert_coco(tmp_path / "set" / "annotations", tmp_path / "set" / "images" / "val2017", tmp_path / "out", names=["cat", "dog"])
    converted = scan_split(load_data_spec(tmp_path / "out" / "data.yaml"), "val")
    assert labels(direct).keys() == labels(converted).keys()
    for name, rows in labels(direct).items():
        assert np.allclose(rows, labels(converted)[name], atol=1e-7)
    assert np.array_equal(direct.shapes_hw, converted.shapes_hw)
    assert direct.report.boxes == 3


@pytest.mark.parametrize("images", ["val2017", "train", "images", "images/train", "annotations/val2017", "."])
def test_images_are_looked_for_in_the_usual_places(tmp_path: Path, images: str) -> None:
    assert len(scan_split(write_set(tmp_path, images=images), "train")) == 2


def test_the_yaml_may_say_where_images_lie_and_what_classes_are_called(tmp_path: Path) -> None:
    spec = write_set(tmp_path / "set", images="pictures")
    with pytest.raises(InputError, match="`images: FOLDER`"):
        scan_split(spec, "train")
    yaml_file = tmp_path / "set" / "data.yaml"
    for folder in ("pictures", {"train": "pictures"}):
        yaml_file.write_text(yaml.safe_dump({"train": "annotations/instances_val2017.json", "images": folder, "names": ["dog", "emu", "cat"]}))
        split = scan_split(load_data_spec(yaml_file), "train")
        assert [row[0] for row in labels(split)["a.png"]] == [0, 2]
    yaml_file.write_text(yaml.safe_dump({"train": "annotations/instances_val2017.json", "images": "pictures", "names": ["dog"]}))
    with pytest.raises(InputError, match="category 'cat' is not among the `names`"):
        scan_split(load_data_spec(yaml_file), "train")


def test_an_image_of_two_files_is_told(tmp_path: Path) -> None:
    """One of the two would lose its boxes, and its objects would be taught as background."""
    write_set(tmp_path)
    other = tmp_path / "annotations" / "more.json"
    other.write_text((tmp_path / "annotations" / "instances_val2017.json").read_text())
    sources = ["annotations/instances_val2017.json", "annotations/more.json"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"train": sources, "val": sources[0], "images": "images/val2017"}))
    spec = load_data_spec(tmp_path / "data.yaml")
    with pytest.raises(InputError, match=r"more\.json lists a\.png, which .*instances_val2017\.json lists already: one entry with all boxes"):
        scan_split(spec, "train")


def test_findings_name_the_image_and_the_box(tmp_path: Path) -> None:
    extra = [
        {"id": 4, "image_id": 2, "category_id": 3, "bbox": [1, 1, 8, 8]},
        {"id": 5, "image_id": 2, "category_id": 3, "bbox": [1, 1, 0, 8]},
        {"id": 6, "image_id": 2, "category_id": 3, "bbox": [100, 1, 5, 8]},
        {"id": 7, "image_id": 2, "category_id": 3, "bbox": [1, 1, float("nan"), 8]},
        {"id": 8, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 1},
    ]
    spec = write_set(tmp_path, [*BOXES, *extra])
    cv2.imwrite(str(tmp_path / "images" / "val2017" / "a.png"), np.zeros((44, 80, 3), np.uint8))
    report = scan_split(spec, "train").report
    b = "images/val2017/below/b.png"
    assert report.duplicate == [f"{b} (x y x y = 1 1 9 9)"]
    assert report.zero_area == [f"{b} (x y x y = 1 1 1 9)", f"{b} (x y x y = 100 1 105 9)"]
    assert report.corrupt == [f"{b} (x y x y = 1 1 nan 9)"]
    assert report.crowds == ["images/val2017/a.png"]
    assert report.other_size == ["images/val2017/a.png (80x44, annotated 60x40)"]


def test_a_staged_copy_has_label_files_with_the_same_bits(tmp_path: Path) -> None:
    spec = write_set(tmp_path / "set", [*BOXES, {"id": 9, "image_id": 2, "category_id": 7, "bbox": [1 / 3, 2 / 3, 7 / 9, 11 / 7]}])
    layout = plan_layout(spec)
    for name, file in layout.files:
        copy = tmp_path / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for name, text in layout.texts.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_text(text)
    copied = scan_split(load_data_spec(tmp_path / "copy" / "data.yaml"), "train")
    assert labels(copied) == labels(scan_split(spec, "train"))


def test_other_names_are_other_classes_in_a_cached_scan_too(tmp_path: Path) -> None:
    first = labels(scan_split(write_set(tmp_path, names=["cat", "dog"]), "train"))
    file = tmp_path / "data.yaml"
    file.write_text(file.read_text().replace("- cat\n- dog", "- dog\n- cat"))
    turned = labels(scan_split(load_data_spec(file), "train"))
    assert first["b.png"][0][0] == 0
    assert turned["b.png"][0][0] == 1
