"""Pipelines of albumentations: loaded from its own files, driven by the sample's seed, imported only where they are used."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from horoyolo.config import InputError
from horoyolo.data.albumentation import load_pipeline

# As albumentations.save(..., data_format="yaml") wrote it.
FLIP = {"__class_fullname__": "HorizontalFlip", "p": 1.0}
NOISE = {"__class_fullname__": "MultiplicativeNoise", "multiplier": [0.5, 1.5], "per_channel": True, "elementwise": True, "p": 0.5}
CROP = {"__class_fullname__": "CenterCrop", "height": 32, "width": 64, "pad_if_needed": False, "p": 1.0}

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
BOXES = np.array([[2, 40, 20, 80, 40], [1, 0, 0, 10, 10]], np.float32)


def pipeline_file(folder: Path, *steps: dict, **bbox_params: float) -> Path:
    compose = {"__class_fullname__": "Compose", "p": 1.0, "transforms": list(steps), "bbox_params": {"format": "yolo", **bbox_params}}
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"__version__": "2.0.8", "transform": compose}))
    return file


@pytest.fixture
def _library() -> None:
    pytest.importorskip("albumentations", reason="albumentations is not installed (scripts/setup.sh does)")


@pytest.mark.usefixtures("_library")
def test_boxes_go_where_the_pixels_go(tmp_path: Path) -> None:
    image, boxes = load_pipeline(pipeline_file(tmp_path, FLIP))(IMAGE, BOXES, np.random.default_rng(0))
    assert np.array_equal(image, IMAGE[:, ::-1])
    assert np.allclose(boxes, [[2, 48, 20, 88, 40], [1, 118, 0, 128, 10]], atol=1e-3)
    assert boxes.dtype == np.float32


@pytest.mark.usefixtures("_library")
def test_what_a_pipeline_crops_is_scaled_back_and_boxes_outside_go(tmp_path: Path) -> None:
    image, boxes = load_pipeline(pipeline_file(tmp_path, CROP))(IMAGE, BOXES, np.random.default_rng(0))
    assert image.shape == IMAGE.shape
    assert np.allclose(boxes, [[2, 16, 8, 96, 48]], atol=1e-3)
    assert len(load_pipeline(pipeline_file(tmp_path, FLIP, min_area=200))(IMAGE, BOXES, np.random.default_rng(0))[1]) == 1


@pytest.mark.usefixtures("_library")
def test_randomness_comes_from_the_generator_alone(tmp_path: Path) -> None:
    pipeline = load_pipeline(pipeline_file(tmp_path, NOISE))
    there = pickle.loads(pickle.dumps(pipeline))  # as a loader process gets it
    before = IMAGE.copy(), BOXES.copy()
    first = [pipeline(IMAGE, BOXES, np.random.default_rng(seed))[0].tobytes() for seed in range(12)]
    again = [there(IMAGE, BOXES, np.random.default_rng(seed))[0].tobytes() for seed in reversed(range(12))]
    assert first == again[::-1]
    assert len(set(first)) > 3
    assert np.array_equal(before[0], IMAGE)
    assert np.array_equal(before[1], BOXES)


@pytest.mark.usefixtures("_library")
def test_an_image_without_boxes_stays_without(tmp_path: Path) -> None:
    _, boxes = load_pipeline(pipeline_file(tmp_path, FLIP))(IMAGE, BOXES[:0], np.random.default_rng(0))
    assert boxes.shape == (0, 5)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(
    ("step", "word"),
    [
        ({"__class_fullname__": "NoSuchThing", "p": 1.0}, "NoSuchThing"),
        ({"__class_fullname__": "HorizontalFlip", "strength": 3, "p": 1.0}, "strength"),
        ({"__class_fullname__": "Normalize", "p": 1.0}, "uint8"),
        ({"__class_fullname__": "Crop", "x_min": 0, "y_min": 0, "x_max": 500, "y_max": 500, "p": 1.0}, "fails on an image"),
    ],
)
def test_a_pipeline_that_cannot_be_used_is_refused_with_its_reason(tmp_path: Path, step: dict, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        load_pipeline(pipeline_file(tmp_path, step))
    assert "pipeline.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hyp.yaml").write_text("lr0: 0.01\n")
    with pytest.raises(InputError, match="no key `transform`"):
        load_pipeline(tmp_path / "hyp.yaml")


def test_nothing_imports_the_library_before_it_is_used() -> None:
    program = "import sys, horoyolo.engine.start, horoyolo.cli; sys.exit('albumentations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
