"""Scores are pycocotools' own, whoever computed the detections."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from horoyolo.distributed.comm import LocalComm
from horoyolo.elastic.member import Fixed
from horoyolo.engine.build import Training
from horoyolo.engine.evaluate import CocoEvaluator, at_best_f1, score, to_original

WORKER = Path(__file__).parent / "score_worker.py"
scene = runpy.run_path(str(WORKER))["scene"]


def by_pycocotools(split: Any, detections: np.ndarray) -> np.ndarray:
    """AP, AP50, AP75, AP of small, medium and large boxes, ...; -1 where there is no box."""
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
    return evaluation.stats


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_pycocotools(seed: int) -> None:
    split, detections = scene(seed)
    metrics = score(split, detections)
    map50_95, map50, _, *of_size = by_pycocotools(split, detections)[:6]
    assert 0.1 < map50 < 1
    assert metrics["map50"] == pytest.approx(map50, abs=1e-6)
    assert metrics["map50_95"] == pytest.approx(map50_95, abs=1e-6)
    assert metrics["instances"] == sum(map(len, split.labels)) == sum(size["instances"] for size in metrics["by_size"].values())
    assert sum(ap > 0 for ap in of_size) > 1
    for (size, found), ap in zip(metrics["by_size"].items(), of_size, strict=True):
        assert found["map50_95"] == (None if ap < 0 else pytest.approx(ap, abs=1e-6)), size


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
    evaluator = CocoEvaluator(split)

    def give() -> None:
        for image in range(len(split.labels)):
            rows = torch.from_numpy(detections[detections[:, 0] == image])
            evaluator.process(image, torch.cat([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], 1), rows[:, 5], rows[:, 6])

    give()
    expected = score(split, detections)
    assert evaluator.evaluate(LocalComm())["map50"] == pytest.approx(expected["map50"], abs=1e-9)
    evaluator.reset()
    assert evaluator.evaluate(LocalComm())["map50"] == 0


def test_workers_score_together_what_one_scores_alone() -> None:
    """Three workers, each with every third image."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["horovodrun", "-np", "3", "-H", "localhost:3", "--gloo", "--network-interfaces", "lo"]
    lines = []
    for argv in ([sys.executable, str(WORKER)], [*launch, sys.executable, str(WORKER)]):
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append([json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if "{" in line])
    (alone,), together = lines
    assert alone["map50"] > 0.1
    assert together == [alone] * 3


def test_no_file_of_coco_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    score(*scene(3))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_each_batch_of_an_evaluation_is_a_step_for_whoever_watches(open_job: Any) -> None:
    """A worker that hangs in one is found as soon as in a step of training, and a long evaluation is not taken for one that hangs."""
    job = open_job(batch=1)
    begun: list[str] = []

    class Watched(Fixed):
        def steps(self, batches: Any, kind: str) -> Any:
            for batch in batches:
                begun.append(kind)
                yield batch

    job.member = Watched()
    job.evaluate(job.model)
    assert begun == ["evaluate"] * len(job.val_loader)
    assert len(begun) > 1


def test_losses_are_of_the_split_however_it_is_cut(open_job: Any) -> None:
    """As one batch, and as batches of one, of which one has no objects."""
    losses = []
    for batch in (2, 1):
        job = open_job(batch=batch)
        job.val_split.labels[0] = np.zeros((0, 5), np.float32)
        losses.append(job.evaluate(job.ema.model.eval())[1])
    assert all(loss > 0 for loss in losses[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_images_that_can_not_be_read_any_more_are_named(open_job: Any, caplog: pytest.LogCaptureFixture) -> None:
    job = open_job(batch=2)
    gone = job.val_split.image_paths[0]
    content = gone.read_bytes()
    gone.unlink()
    try:
        job.evaluate(job.ema.model.eval())
    finally:
        gone.write_bytes(content)
    assert "1 images of val can't be read" in caplog.text
    assert gone.name in caplog.text


def test_of_a_class_without_a_box_in_val_nothing_is_known_to_draw_by(open_job: Callable[..., Training]) -> None:
    """As in YOLOv5: it counts as found as well as the others, or its images would be all that is seen."""
    job = open_job(**{"input.sampling": "images"})
    names, balance = job.val_split.names, job.sampler.balance
    of_class = {name: {"map50_95": 0.8, "instances": 3} for name in names.values()} | {names[0]: {"map50_95": 0.0, "instances": 0}}
    job.heed({"per_class": of_class, "map50_95": 0.8})
    assert balance is not None
    assert balance.ap.tolist() == [0.8] * len(names)
