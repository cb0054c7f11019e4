"""Scores are pycocotools' own, whoever computed the detections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from horoyolo.distributed.comm import LocalComm
from horoyolo.engine.evaluate import CocoEvaluator, at_best_f1, score, to_original


@dataclass
class Scene:
    """What scoring needs of a split."""

    labels: list[np.ndarray]
    shapes_hw: np.ndarray
    names: dict[int, str]

    def __len__(self) -> int:
        return len(self.labels)


def scene(seed: int, images: int = 12, classes: int = 4) -> tuple[Scene, np.ndarray]:
    """A split with labels of all classes but the last, and detections near them, beside them and of the wrong class."""
    rng = np.random.default_rng(seed)
    labels, detections = [], []
    shapes_hw = rng.integers(100, 400, (images, 2))
    for image, (height, width) in enumerate(shapes_hw):
        wh = rng.uniform(0.05, 0.4, (rng.integers(0, 9), 2))
        xy = rng.uniform(0.3, 0.7, wh.shape)
        classes_here = rng.integers(0, classes - 1, (len(wh), 1))
        labels.append(np.hstack([classes_here, xy, wh]).astype(np.float32))
        for row in labels[-1]:
            for _ in range(rng.integers(0, 3)):
                box = row[1:] + rng.normal(0, 0.02, 4)
                x, y, w, h = box * [width, height, width, height]
                label = row[0] if rng.random() < 0.8 else rng.integers(0, classes)
                detections.append([image, x - w / 2, y - h / 2, w, h, rng.random(), label])
    return Scene(labels, shapes_hw, {i: f"class {i}" for i in range(classes)}), np.array(detections)


def by_pycocotools(split: Scene, detections: np.ndarray) -> tuple[float, float]:
    annotations = []
    for image, (rows, (height, width)) in enumerate(zip(split.labels, split.shapes_hw, strict=True)):
        for label, x, y, w, h in rows.astype(np.float64):
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            number = len(annotations) + 1
            annotations.append({"id": number, "image_id": image, "category_id": int(label), "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(split.labels))],
        "categories": [{"id": i} for i in split.names],
        "annotations": annotations,
        "info": {},
    }
    coco.createIndex()
    results = [{"image_id": int(r[0]), "bbox": r[1:5].tolist(), "score": r[5], "category_id": int(r[6])} for r in detections]
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[1], evaluation.stats[0]


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_pycocotools(seed: int) -> None:
    split, detections = scene(seed)
    metrics = score(split, detections)
    map50, map50_95 = by_pycocotools(split, detections)
    assert 0.1 < map50 < 1
    assert metrics["map50"] == pytest.approx(map50, abs=1e-6)
    assert metrics["map50_95"] == pytest.approx(map50_95, abs=1e-6)
    assert metrics["instances"] == sum(map(len, split.labels))


def test_perfect_detections_score_one_and_none_score_zero() -> None:
    split, _ = scene(0)
    perfect = np.array(
        [
            [image, (x - w / 2) * width, (y - h / 2) * height, w * width, h * height, 0.9, label]
            for image, (rows, (height, width)) in enumerate(zip(split.labels, split.shapes_hw, strict=True))
            for label, x, y, w, h in rows.astype(np.float64)
        ]
    )
    metrics = score(split, perfect)
    for name in ("map50", "map50_95", "precision", "recall"):
        assert metrics[name] == pytest.approx(1, abs=1e-6), name
    empty = score(split, np.zeros((0, 7)))
    assert (empty["map50"], empty["precision"], empty["recall"]) == (0, 0, 0)


def test_a_split_without_boxes_scores_zero() -> None:
    split, detections = scene(1)
    split.labels = [np.zeros((0, 5), np.float32)] * len(split.labels)
    assert score(split, detections)["map50"] == 0


def test_best_f1_is_found_on_the_curve() -> None:
    # One class: perfect up to a recall of 0.6 at confidence 0.5, then half wrong down to 0.1.
    recalls = np.linspace(0, 1, 101)
    precisions = np.where(recalls <= 0.6, 1.0, 0.2)[:, None]
    confidences = np.where(recalls <= 0.6, 0.5, 0.1)[:, None]
    precision, recall = at_best_f1(precisions, confidences)
    assert (precision[0], recall[0]) == (1.0, pytest.approx(0.6))


def test_boxes_come_back_to_the_original_image() -> None:
    original = torch.tensor([[10.0, 20.0, 50.0, 60.0], [-5.0, 0.0, 700.0, 90.0]])
    gain, pad = torch.tensor(0.5, dtype=torch.float64), torch.tensor([3.0, 7.0], dtype=torch.float64)
    letterboxed = original * 0.5 + torch.tensor([3.0, 7.0, 3.0, 7.0])
    back = to_original(letterboxed, gain, pad, torch.tensor([80, 640]))
    assert torch.allclose(back[0].float(), original[0])
    assert back[1].tolist() == [0, 0, 640, 80]


def test_evaluator_counts_what_it_was_given_and_forgets_on_reset() -> None:
    split, detections = scene(2)
    evaluator = CocoEvaluator(split)  # type: ignore[arg-type]

    def give() -> None:
        for image in range(len(split.labels)):
            rows = torch.from_numpy(detections[detections[:, 0] == image])
            evaluator.process(image, torch.cat([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], 1), rows[:, 5], rows[:, 6])

    give()
    expected = score(split, detections)  # type: ignore[arg-type]
    assert evaluator.evaluate(LocalComm())["map50"] == pytest.approx(expected["map50"], abs=1e-9)
    evaluator.reset()
    assert evaluator.evaluate(LocalComm())["map50"] == 0


def test_no_file_of_coco_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    score(*scene(3))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
