from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.config import InputError
from horoyolo.engine.device import numerics_for
from horoyolo.model.weights import save_weights
from horoyolo.model.yolo import build_model
from horoyolo.predict import annotated_paths, detect, find_images, predict

CPU = numerics_for(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model for images of 64 pixels; with a low confidence it finds plenty."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_weights(path, build_model("yolov5n", 2, {0: "ball", 1: "box"}), {"img": 64})
    return path


def write_image(path: Path, hw: tuple[int, int] = (48, 80)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    assert cv2.imwrite(str(path), rng.integers(0, 255, (*hw, 3), dtype=np.uint8))
    return path


class BrightSpot:
    """Stands for a detector: gives the box around the white pixels it is shown, as sure as sure."""

    def __init__(self) -> None:
        self.strides = (8, 16, 32)
        self.names = {0: "spot"}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen_hw = tuple(images.shape[2:])
        return images

    def decode(self, images: torch.Tensor) -> torch.Tensor:
        y, x = (images[0].amin(0) > 0.75).nonzero(as_tuple=True)
        left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
        return torch.tensor([[[(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, 1, 1]]])


@settings(max_examples=40, deadline=None)
@given(hw=st.tuples(st.integers(20, 400), st.integers(20, 400)), size=st.sampled_from([64, 96, 100, 160]), data=st.data())
def test_boxes_come_back_in_pixels_of_the_original(hw: tuple[int, int], size: int, data: st.DataObject) -> None:
    height, width = hw
    pixel = max(hw) / size  # of the scaled image, in the original
    least = min(int(4 * pixel) + 4, *hw)
    w, h = data.draw(st.integers(least, width)), data.draw(st.integers(least, height))
    left, top = data.draw(st.integers(0, width - w)), data.draw(st.integers(0, height - h))
    image = np.zeros((height, width, 3), np.uint8)
    image[top : top + h, left : left + w] = 255
    detector = BrightSpot()
    (box,) = detect(detector, image, size, 0.25, 0.45, CPU)  # type: ignore[arg-type]
    np.testing.assert_allclose(box["xyxy"], [left, top, left + w, top + h], rtol=0, atol=1.5 * pixel + 1)
    assert 0 <= box["xyxy"][0] < box["xyxy"][2] <= width
    assert 0 <= box["xyxy"][1] < box["xyxy"][3] <= height
    assert [side % 32 for side in detector.seen_hw] == [0, 0]
    assert max(detector.seen_hw) == -(-size // 32) * 32
    assert (box["class"], box["name"], box["confidence"]) == (0, "spot", 1.0)


@pytest.mark.parametrize("name", ["bus", "zidane"])
def test_detections_of_the_public_checkpoint(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "data" / "images" / f"{name}.jpg"
    (entry,) = predict(shared / "weights" / "yolov5n_coco.pt", str(source), tmp_path)
    expected = np.load(shared / "golden" / f"detect_{name}.npz")["nms_xyxy_conf_cls"]
    assert [box["class"] for box in entry["boxes"]] == expected[:, 5].tolist()
    np.testing.assert_allclose([box["xyxy"] for box in entry["boxes"]], expected[:, :4], rtol=0, atol=0.1)
    np.testing.assert_allclose([box["confidence"] for box in entry["boxes"]], expected[:, 4], rtol=0, atol=1e-3)
    assert entry["boxes"][0]["name"] in ("person", "bus")


def test_every_image_is_listed_and_drawn(weights: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "new" / "out"
    for name in ("b.png", "a.jpg", "Ü ä.bmp", "c.JPG"):
        write_image(source / name)
    (source / "torn.jpg").write_bytes((source / "a.jpg").read_bytes()[:500])
    (source / "empty.png").touch()
    (source / "notes.txt").write_text("no image")
    returned = predict(weights, str(source), out, conf=0.001)
    written = json.loads((out / "predictions.json").read_text())
    assert written == returned
    assert [entry["image"] for entry in written] == sorted(str(path) for path in source.iterdir() if path.suffix != ".txt")
    good = [entry for entry in written if "error" not in entry]
    assert {Path(entry["image"]).name for entry in written if "error" in entry} == {"torn.jpg", "empty.png"}
    assert all(entry["boxes"] == [] for entry in written if "error" in entry)
    assert sorted(os.listdir(out)) == sorted([Path(entry["image"]).name for entry in good] + ["predictions.json"])
    for entry in good:
        confidences = [box["confidence"] for box in entry["boxes"]]
        assert confidences == sorted(confidences, reverse=True) != []
        assert all(set(box) == {"xyxy", "confidence", "class", "name"} for box in entry["boxes"])
        assert {(box["class"], box["name"]) for box in entry["boxes"]} <= {(0, "ball"), (1, "box")}
        before, after = cv2.imread(entry["image"]), cv2.imread(str(out / Path(entry["image"]).name))
        assert before.shape == after.shape
        assert (before != after).any()


def test_the_size_is_the_trained_one_unless_given(weights: Path, tmp_path: Path) -> None:
    source = str(write_image(tmp_path / "in" / "a.png"))
    trained, same, other = (predict(weights, source, tmp_path / "out", img, conf=0.001) for img in (None, 64, 128))
    assert trained == same
    assert trained != other


def test_a_source_is_a_file_a_folder_or_a_pattern(tmp_path: Path) -> None:
    one, two, odd = (write_image(tmp_path / name) for name in ("x/1.jpg", "y/z/2.png", "x/[1].jpg"))
    (tmp_path / "x" / "folder.jpg").mkdir()
    assert find_images(str(one)) == [one]
    assert find_images(str(odd)) == [odd]
    assert find_images(str(tmp_path / "x")) == [one, odd]
    assert find_images(str(tmp_path / "x" / "?.jpg")) == [one]
    assert find_images(str(tmp_path / "**" / "*.*")) == [one, odd, two]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["1.jpg", "1-2.jpg", "1-3.jpg", "1.mpo", "1.mpo.jpg"])), unique=True))
def test_annotated_images_never_share_a_name(parts: list[tuple[str, str]]) -> None:
    images = [Path(folder, name) for folder, name in parts]
    paths = annotated_paths(images, Path("out"))
    assert list(paths) == images
    assert len(set(paths.values())) == len(images)
    for path in paths.values():
        assert path.parent == Path("out")
        assert cv2.haveImageWriter(path.name)
    kept = {path.name for image, path in paths.items() if path.name == image.name}
    assert kept == {image.name for image in images if image.suffix == ".jpg"}


def test_images_of_the_same_name_are_all_drawn(weights: Path, tmp_path: Path) -> None:
    for folder in "xyz":
        write_image(tmp_path / folder / "1.jpg")
    predict(weights, str(tmp_path / "?" / "1.jpg"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["1-2.jpg", "1-3.jpg", "1.jpg", "predictions.json"]


def test_bad_input_is_refused_before_anything_is_written(weights: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "in" / "a.png")
    (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "torn.pt").write_bytes(weights.read_bytes()[:1000])
    before = sorted(tmp_path.rglob("*"))
    content = image.read_bytes()
    out = tmp_path / "out"
    for message, pt, source, target in (
        ("no such file or folder", weights, tmp_path / "absent.jpg", out),
        ("no file matches", weights, tmp_path / "in" / "*.jpg", out),
        ("no images there", weights, tmp_path / "none", out),
        ("no images there", weights, tmp_path / "file", out),
        ("no such file", tmp_path / "absent.pt", image, out),
        ("torn", tmp_path / "torn.pt", image, out),
        ("not a folder", weights, image, tmp_path / "file"),
        ("can't be made", weights, image, tmp_path / "file" / "out"),
        ("would be overwritten", weights, image, tmp_path / "in"),
        ("would be overwritten", weights, image, tmp_path / "none" / ".." / "in"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            predict(pt, str(source), target)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
    assert image.read_bytes() == content
