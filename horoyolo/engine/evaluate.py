"""Scoring over all workers: each image once, AP by pycocotools' definition."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from horoyolo.data.scan import Split, shorten
from horoyolo.distributed.comm import Comm
from horoyolo.engine.device import Numerics
from horoyolo.model.boxes import non_max_suppression
from horoyolo.model.loss import DetectionLoss
from horoyolo.model.yolo import YOLO, fuse_conv_bn

log = logging.getLogger("horoyolo")

CONFIDENCE = 0.001
NMS_IOU = 0.6
MAX_DETECTIONS = 100
IOU_50 = 0  # index of IoU 0.5 among COCO's ten thresholds
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # COCO's areas in square pixels of the original, ends included

Metrics = dict[str, Any]


class CocoEvaluator:
    """Collects this worker's detections, then scores those of all workers together."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self.reset()

    def reset(self) -> None:
        """Forgets all detections."""
        self._rows: list[np.ndarray] = []

    def process(self, index: int, boxes_xyxy: Tensor, confidences: Tensor, labels: Tensor) -> None:
        """Notes the detections of one image (its index in the split): (n, 4) in pixels of the original, (n,), (n,)."""
        rows = np.empty((len(boxes_xyxy), 7))  # image, x, y, w, h, confidence, class
        rows[:, 0] = index
        rows[:, 1:5] = boxes_xyxy.double().cpu().numpy()
        rows[:, 3:5] -= rows[:, 1:3]
        rows[:, 5] = confidences.double().cpu().numpy()
        rows[:, 6] = labels.cpu().numpy()
        self._rows.append(rows)

    def evaluate(self, comm: Comm) -> Metrics:
        """The metrics over all workers' detections, the same on every worker; what metrics.json holds of an epoch."""
        mine = torch.from_numpy(np.concatenate([np.zeros((0, 7)), *self._rows]))
        everyone = comm.allgather(mine, "evaluate.detections").numpy()
        metrics = score(self._split, everyone) if comm.rank() == 0 else None
        return comm.broadcast_object(metrics)


def evaluate(
    model: YOLO, loader: Iterable[Any], split: Split, numerics: Numerics, comm: Comm, loss: DetectionLoss | None = None
) -> tuple[Metrics, list[float]]:
    """Runs ``model`` over this worker's share of ``split`` and scores all shares together.

    Gives the metrics and, with ``loss``, the losses (box, obj, cls) of the split as one batch, however it was cut. Images that can't be read count
    as without objects; rank 0 names them.
    """
    model = fuse_conv_bn(model)
    evaluator = CocoEvaluator(split)
    loss_sums = torch.zeros(len(model.strides), 4, dtype=torch.float64)  # of each layer box, obj, cls, and its matches
    failed: set[str] = set()
    with torch.inference_mode():
        for batch in loader:
            failed.update(batch.failed)
            with numerics.autocast():
                heads = model(numerics.as_input(batch.images))
            if loss is not None:
                targets = batch.targets.to(numerics.device)
                loss_sums[:, 3] += loss.count_positives(targets, [tuple(head.shape[2:4]) for head in heads]).cpu()
                loss_sums[:, :3] += torch.stack([torch.stack(sums) for sums in loss.layer_sums(heads, targets, len(split))]).cpu()
            detections = non_max_suppression(
                model.decode(heads), CONFIDENCE, NMS_IOU, multi_label=True, max_detections=MAX_DETECTIONS
            )
            for i, rows in enumerate(detections):
                boxes_xyxy = to_original(rows[:, :4], batch.gains[i], batch.pads[i], batch.original_hw[i])
                evaluator.process(int(batch.indices[i]), boxes_xyxy, rows[:, 4], rows[:, 5])
    metrics = evaluator.evaluate(comm)
    comm.allreduce(loss_sums, name="evaluate.losses")
    unreadable = sorted(set().union(*comm.allgather_object(failed)))
    if unreadable and comm.rank() == 0:
        log.warning("%d images of %s can't be read and count as found empty: %s", len(unreadable), split.name, shorten(unreadable))
    return metrics, [] if loss is None else loss.mean(loss_sums[:, :3].tolist(), loss_sums[:, 3]).tolist()


def to_original(boxes_xyxy: Tensor, gain: Tensor, pad: Tensor, original_hw: Tensor) -> Tensor:
    """Boxes (n, 4) of a letterboxed image, of which a point is gain * original + pad, in pixels of the original, clipped to it."""
    height, width = original_hw.tolist()
    boxes = (boxes_xyxy.double().cpu() - pad.double().repeat(2)) / float(gain)
    return boxes.clamp(min=torch.zeros(4, dtype=boxes.dtype), max=boxes.new_tensor([width, height, width, height]))


def score(split: Split, detections: np.ndarray) -> Metrics:
    """AP, and precision and recall at the confidence where the mean F1 is best, of ``detections`` (n, 7): image, x, y, w, h, confidence, class.

    Classes without a box in the split are left out of the means, as in pycocotools; so are, of the AP of a size, those without a box of that size,
    and it is None where there is none of any.
    """
    truth = _ground_truth(split)
    class_ids = sorted(split.names)
    instances = np.bincount(truth["class"], minlength=len(class_ids))
    present = [i for i in class_ids if instances[i]]
    areas = truth["box"][:, 2:].prod(1)
    of_size = {size: int(((least <= areas) & (areas <= most)).sum()) for size, (least, most) in SIZES.items()}
    ap_of_size = {size: 0.0 if count else None for size, count in of_size.items()}
    precision, recall, ap50, ap = (np.zeros(len(class_ids)) for _ in range(4))
    if len(detections) and present:
        (precisions, *others), confidences = _coco_curves(split, truth, detections)
        ap[present] = precisions[:, :, present].mean((0, 1))
        ap50[present] = precisions[IOU_50][:, present].mean(0)
        precision[present], recall[present] = at_best_f1(precisions[IOU_50][:, present], confidences[IOU_50][:, present])
        known = {size: of_this[of_this > -1] for size, of_this in zip(SIZES, others, strict=True)}
        ap_of_size |= {size: float(values.mean()) for size, values in known.items() if len(values)}
    per_class = {
        split.names[i]: {
            "map50": float(ap50[i]),
            "map50_95": float(ap[i]),
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "instances": int(instances[i]),
            "images": len(np.unique(truth["image"][truth["class"] == i])),
        }
        for i in class_ids
    }

    def mean(values: np.ndarray) -> float:
        return float(values[present].mean()) if present else 0.0

    return {
        "map50": mean(ap50),
        "map50_95": mean(ap),
        "precision": mean(precision),
        "recall": mean(recall),
        "per_class": per_class,
        "by_size": {size: {"map50_95": ap_of_size[size], "instances": count} for size, count in of_size.items()},
        "images": len(split),
        "instances": int(instances.sum()),
    }


def at_best_f1(precisions: np.ndarray, confidences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of each class at the one confidence where the mean F1 over classes is best.

    ``precisions`` and ``confidences`` (R, K) are a class's precision, and the confidence that reaches it, at R recalls from 0 to 1; 0 where a
    recall is not reached.
    """
    recalls = np.linspace(0, 1, len(precisions))
    thresholds = np.linspace(0.001, 0.999, 999)
    # The largest recall that a class reaches at each threshold; (T, K) index into the curve, -1 for none.
    reached = (confidences[None] >= thresholds[:, None, None]).sum(1) - 1
    precision = np.where(reached >= 0, np.take_along_axis(precisions, reached.clip(0), 0), 0.0)
    recall = np.where(reached >= 0, recalls[reached.clip(0)], 0.0)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-16)
    best = f1.mean(1).argmax()
    return precision[best], recall[best]


def _ground_truth(split: Split) -> dict[str, np.ndarray]:
    """All labels of a split, one row each: image (n,), class (n,), box x, y, w, h in pixels of the original (n, 4)."""
    image = np.repeat(np.arange(len(split)), [len(labels) for labels in split.labels])
    rows = np.concatenate([np.zeros((0, 5)), *split.labels]).astype(np.float64)
    sides = split.shapes_hw[image][:, [1, 0]].astype(np.float64)
    wh = rows[:, 3:5] * sides
    return {"image": image, "class": rows[:, 0].astype(int), "box": np.hstack([rows[:, 1:3] * sides - wh / 2, wh])}


def _coco_curves(split: Split, truth: dict[str, np.ndarray], detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision (1 + sizes, IoU threshold, recall, class) of all boxes, then of each of ``SIZES``, -1 where there is none, and the confidence that
    reaches that of all; up to 100 detections an image."""
    dataset = COCO()
    dataset.dataset = {
        "info": {},
        "images": [{"id": i, "height": int(h), "width": int(w)} for i, (h, w) in enumerate(split.shapes_hw)],
        "categories": [{"id": i, "name": name} for i, name in split.names.items()],
        "annotations": [
            {"id": number, "image_id": int(image), "category_id": int(label), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for number, (image, label, box) in enumerate(zip(truth["image"], truth["class"], truth["box"].tolist(), strict=True), start=1)
        ],
    }
    dataset.createIndex()
    found = dataset.loadRes(
        [
            {"image_id": int(row[0]), "bbox": row[1:5].tolist(), "score": float(row[5]), "category_id": int(row[6])}
            for row in detections
        ]
    )
    evaluation = COCOeval_faster(dataset, found, "bbox")
    evaluation.params.maxDets = [MAX_DETECTIONS]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10], *map(list, SIZES.values())], ["all", *SIZES]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.moveaxis(evaluation.eval["precision"][..., 0], -1, 0), evaluation.eval["scores"][:, :, :, 0, 0]
