"""Conversion: what goes in comes out, what is dropped is said, and nothing is left half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import yaml

from horoyolo.config import InputError
from horoyolo.data.convert import convert_coco, convert_voc
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.data.synthetic import draw_scene, write_synthetic

JPEG = simplejpeg.encode_jpeg(np.zeros((100, 200, 3), np.uint8))
Objects = list[tuple[str, int, int, int, int]]


def write_voc(root: Path, splits: dict[str, dict[str, Objects]], difficult: int = 0) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, images in splits.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
        for stem, objects in images.items():
            (root / "JPEGImages" / f"{stem}.jpg").write_bytes(JPEG)
            items = [
                f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
                f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for name, x1, y1, x2, y2 in objects
            ]
            (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{''.join(items)}</annotation>")
    return root


def coco_content(**changes: Any) -> dict[str, Any]:
    content = {
        "images": [{"id": 7, "file_name": "deep/images/a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 90, "name": "cat"}, {"id": 5, "name": "emu"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [20, 10, 100, 50]},
            {"image_id": 7, "category_id": 90, "bbox": [0, 0, 0, 50]},
            {"image_id": 7, "category_id": 90, "bbox": [0, 0, 20, 50], "iscrowd": 1},
        ],
    }
    return content | changes


def write_coco(root: Path, content: dict[str, Any], name: str = "instances.json") -> tuple[Path, Path]:
    for file in ("deep/images/a.jpg", "b.jpg"):
        (root / "pictures" / file).parent.mkdir(parents=True, exist_ok=True)
        (root / "pictures" / file).write_bytes(JPEG)
    (root / name).write_text(json.dumps(content))
    return root / name, root / "pictures"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_voc_boxes_are_normalised_clipped_and_dropped_without_area(tmp_path: Path) -> None:
    source = write_voc(
        tmp_path / "voc",
        {
            "train": {"a": [("b", 20, 10, 120, 60), ("a", 150, 50, 250, 150)]},
            "val": {"c": [("a", 5, 5, 5, 9), ("a", 0, 0, 200, 100)], "d": []},
        },
    )
    report = convert_voc(source, tmp_path / "out")
    assert (report.images, report.boxes) == ({"train": 1, "val": 2}, {"train": 2, "val": 1})
    assert report.zero_area == ["c.jpg"]
    assert "1 boxes without area dropped: c.jpg" in report.lines()
    spec = load_data_spec(tmp_path / "out" / "data.yaml")
    assert spec.names == {0: "a", 1: "b"}
    split = scan_split(spec, "train")
    assert np.allclose(split.labels[0], [[1, 0.35, 0.35, 0.5, 0.5], [0, 0.875, 0.75, 0.25, 0.5]])
    val = scan_split(spec, "val")
    assert val.report.boxes == 1
    assert val.report.empty_labels == ["images/val/d.jpg"]
    assert (tmp_path / "out" / "images" / "train" / "a.jpg").read_bytes() == JPEG


def test_voc_names_may_have_spaces_and_lists_a_mark_of_the_byte_order(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc", {"train": {"my image": [("cell", 20, 10, 120, 60)], "b": [("cell", 20, 10, 120, 60)]}})
    file = root / "ImageSets" / "Main" / "train.txt"
    file.write_text("\ufeffmy image\nb  -1\n", encoding="utf-8")
    assert convert_voc(root, tmp_path / "out").images == {"train": 2}
    file.write_bytes("für\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"train\.txt is not UTF-8"):
        convert_voc(root, tmp_path / "other")


def test_names_given_set_the_order(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"train": {"a": [("b", 20, 10, 120, 60)]}})
    convert_voc(source, tmp_path / "out", names=["b", "a"])
    assert load_data_spec(tmp_path / "out" / "data.yaml").names == {0: "b", 1: "a"}
    with pytest.raises(InputError, match="class 'b' of the annotations is not among the names given: c"):
        convert_voc(source, tmp_path / "other", names=["c"])
    assert leftovers(tmp_path) == ["out", "voc"]


def test_difficult_objects_and_corrupt_images_are_left_out_and_reported(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"train": {"a": [("b", 20, 10, 120, 60)]}}, difficult=1)
    report = convert_voc(source, tmp_path / "out", names=["b"])
    assert report.skipped == ["a.jpg"]
    assert report.boxes == {"train": 0}
    (source / "JPEGImages" / "a.jpg").write_bytes(JPEG[:30])
    report = convert_voc(source, tmp_path / "other", names=["b"])
    assert report.corrupt_images == ["a.jpg"]
    assert report.images == {"train": 0}


ENTITIES = '<!DOCTYPE x [<!ENTITY a "b"><!ENTITY c "&a;&a;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize(
    "annotation", [ENTITIES, ENTITIES.encode("utf-16"), "<annotation><object>", "<a><object><name>b</name></object></a>"]
)
def test_unsafe_or_broken_annotation_is_one_line_and_leaves_nothing(tmp_path: Path, annotation: str | bytes) -> None:
    source = write_voc(tmp_path / "voc", {"train": {"a": [("b", 20, 10, 120, 60)]}})
    data = annotation if isinstance(annotation, bytes) else annotation.encode()
    (source / "Annotations" / "a.xml").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.xml is not a readable Pascal VOC annotation") as error:
        convert_voc(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path) == ["voc"]


def test_voc_without_lists_or_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a Pascal VOC folder"):
        convert_voc(tmp_path, tmp_path / "out")
    source = write_voc(tmp_path / "voc", {"train": {"a": [("b", 20, 10, 120, 60)]}})
    (source / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"train\.txt lists a, but there is no such image"):
        convert_voc(source, tmp_path / "out")
    assert leftovers(tmp_path) == ["voc"]


def test_existing_output_is_refused_untouched(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "voc", {"train": {"a": [("b", 20, 10, 120, 60)]}})
    (tmp_path / "out").mkdir()
    for write in (lambda: convert_voc(source, tmp_path / "out"), lambda: write_synthetic(tmp_path / "out", 4)):
        with pytest.raises(InputError, match="out exists"):
            write()
    assert leftovers(tmp_path) == ["out", "voc"]
    assert leftovers(tmp_path / "out") == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_voc(tmp_path / "voc", {"train": {"a": [("b", 20, 10, 120, 60)]}})
    monkeypatch.setattr(yaml, "safe_dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_voc(source, tmp_path / "out")
    assert leftovers(tmp_path) == ["voc"]


def test_coco_classes_subfolders_crowds_and_splits(tmp_path: Path) -> None:
    annotations, images = write_coco(tmp_path, coco_content())
    report = convert_coco(annotations, images, tmp_path / "out")
    assert report.images == {"train": 2}
    assert report.boxes == {"train": 1}
    assert report.skipped == report.zero_area == ["deep/images/a.jpg"]
    spec = load_data_spec(tmp_path / "out" / "data.yaml")
    assert spec.names == {0: "cat", 1: "dog", 2: "emu"}
    split = scan_split(spec, "train")
    by_name = dict(zip(split.relative_paths, split.labels, strict=True))
    assert np.allclose(by_name["images/train/deep/images/a.jpg"], [[1, 0.35, 0.35, 0.5, 0.5]])
    assert len(by_name["images/train/b.jpg"]) == 0
    assert spec.splits["val"] == spec.splits["train"]


def test_coco_folder_of_files_makes_a_split_of_each(tmp_path: Path) -> None:
    write_coco(tmp_path / "json", coco_content(), "instances_val2017.json")
    _, images = write_coco(tmp_path / "json", coco_content(), "instances_train2017.json")
    report = convert_coco(tmp_path / "json", images, tmp_path / "out", names=["emu", "dog", "cat"])
    assert list(report.images.items()) == [("train", 2), ("val", 2)]
    spec = load_data_spec(tmp_path / "out" / "data.yaml")
    assert spec.names == {0: "emu", 1: "dog", 2: "cat"}
    assert scan_split(spec, "val").report.boxes == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1, "file_name": "c.jpg"}]}, "lists c.jpg, but there is no such image"),
        ({"images": [{"id": 1, "file_name": "../pictures/b.jpg"}]}, "leads out of its folder"),
        ({"annotations": [{"image_id": 7, "category_id": 4, "bbox": [0, 0, 1, 1]}]}, "is not a COCO instances file"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 1]}]}, "is not a COCO instances file"),
        ({"categories": {}}, "is not a COCO instances file"),
    ],
)
def test_unfit_coco_is_one_line_and_leaves_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    annotations, images = write_coco(tmp_path, coco_content(**changes))
    before = leftovers(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        convert_coco(annotations, images, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"images": 3}'])
def test_what_is_no_coco_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json is not a COCO instances file"):
        convert_coco(tmp_path / "a.json", tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"gone\.json can't be read"):
        convert_coco(tmp_path / "gone.json", tmp_path, tmp_path / "out")


def test_blood_cells_have_the_known_number_of_boxes(shared: Path, tmp_path: Path) -> None:
    report = convert_voc(shared / "data" / "bccd", tmp_path / "bccd")
    assert sorted(report.zero_area) == ["BloodImage_00338.jpg", "BloodImage_00343.jpg"]
    spec = load_data_spec(tmp_path / "bccd" / "data.yaml")
    assert list(spec.names.values()) == ["Platelets", "RBC", "WBC"]
    boxes = {split: scan_split(spec, split).report.boxes for split in ("train", "val", "test")}
    assert boxes == report.boxes == {"train": 2804, "val": 1137, "test": 945}


def test_synthetic_set_is_the_same_for_a_seed_and_split_four_to_one(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_synthetic(tmp_path / name, 10, seed)
    contents = {
        name: {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.*") if file.is_file()}
        for name in "abc"
    }
    assert contents["a"] == contents["b"] != contents["c"]
    spec = load_data_spec(tmp_path / "a" / "data.yaml")
    splits = [scan_split(spec, split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [8, 2]
    assert all(len(split.report.lines()) == 1 for split in splits)  # nothing to complain about


@pytest.mark.parametrize("images", [2, 3, 4, 5])
def test_small_synthetic_sets_have_both_splits(tmp_path: Path, images: int) -> None:
    report = write_synthetic(tmp_path / "out", images)
    assert report.images == {"train": images - 1, "val": 1}
    with pytest.raises(InputError, match="at least 2"):
        write_synthetic(tmp_path / "one", 1)


def test_scene_boxes_enclose_their_shapes() -> None:
    for seed in range(10):
        image, boxes = draw_scene(np.random.default_rng(seed), (240, 320))
        assert 1 <= len(boxes) <= 6
        saturation = image.max(axis=2).astype(int) - image.min(axis=2)
        outside = np.ones(image.shape[:2], bool)
        for _, x1, y1, x2, y2 in boxes.astype(int):
            middle = image[(y1 + y2) // 2, (x1 + x2) // 2].astype(int)
            assert middle.max() - middle.min() > 40
            outside[y1:y2, x1:x2] = False
        assert np.quantile(saturation[outside], 0.99) < 110
        assert boxes[:, 1:].min() >= 0
        assert (boxes[:, 3] <= 320).all()
        assert (boxes[:, 4] <= 240).all()
