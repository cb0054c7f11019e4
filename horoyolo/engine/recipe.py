"""What of a recipe depends on the data: anchors that fit the boxes, weights that even out the classes; and the words that say so."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from horoyolo.config import Config
from horoyolo.data.scan import Split
from horoyolo.engine.schedule import Schedule
from horoyolo.model.anchors import best_possible_recall, fit_anchors, usable
from horoyolo.model.loss import DetectionLoss
from horoyolo.model.yolo import YOLO

log = logging.getLogger("horoyolo")

FEW_UPDATES = 1000  # for a network that starts from scratch
ENOUGH_RECALL = 0.98  # of the boxes within reach of an anchor: below, anchors are fitted anew


def box_sizes(split: Split, img: int) -> np.ndarray:
    """Widths and heights (n, 2) of a split's boxes in pixels, the images' long sides at ``img``."""
    sides = split.shapes_hw[:, ::-1] / split.shapes_hw.max(1, keepdims=True) * img  # (images, 2)
    return np.concatenate([np.zeros((0, 2)), *(labels[:, 3:5] * wh for labels, wh in zip(split.labels, sides, strict=True))])


def settle_anchors(model: YOLO, split: Split, config: Config) -> None:
    """Fits the model's anchors to the training boxes where theirs leave too many out of reach, or the model's table only says how many.

    Only where training begins, and on one worker: the others take its weights, and with them the anchors.
    """
    if not config.recipe.autoanchor:
        return
    boxes_wh = usable(box_sizes(split, config.img))
    anchor_t, wanted = config.hyp.anchor_t, isinstance(model.table["anchors"], int)
    present = model.anchors_px.flatten(0, 1).double().cpu().numpy()  # (num_layers * num_anchors, 2)
    recall = best_possible_recall(boxes_wh, present, anchor_t)
    if recall > ENOUGH_RECALL and not wanted:
        log.info("anchors: %.1f %% of %d boxes within their reach; they stay as they are", 100 * recall, len(boxes_wh))
        return
    if not len(boxes_wh):
        log.warning("anchors: no box is large enough at %d px to fit any to; they stay as they are", config.img)
        return
    fitted = fit_anchors(boxes_wh, len(present), anchor_t, config.seed)
    better = best_possible_recall(boxes_wh, fitted, anchor_t)
    if better <= recall and not wanted:
        log.info("anchors: %.1f %% of %d boxes within their reach; fitted ones would reach no more", 100 * recall, len(boxes_wh))
        return
    model.set_anchors(torch.from_numpy(fitted))
    sizes = ", ".join(f"{width:.0f}x{height:.0f}" for width, height in fitted)
    before = "" if wanted else f" instead of {100 * recall:.1f} %"
    log.info("anchors fitted to %d boxes: %.1f %%%s within their reach; in pixels %s", len(boxes_wh), 100 * better, before, sizes)


def class_counts(split: Split, num_classes: int) -> Tensor:
    """Boxes of each class, (num_classes,) int64."""
    classes = np.concatenate([np.zeros(0), *(labels[:, 0] for labels in split.labels)]).astype(np.int64)
    return torch.from_numpy(np.bincount(classes, minlength=num_classes))


def imbalance_notes(config: Config, loss: DetectionLoss, names: dict[int, str]) -> dict[str, Any]:
    """What the loss does about classes and objects that are rare, for metrics.json; empty where it does nothing."""
    hyper, notes = config.hyp, {}
    if loss.class_weights is not None:
        notes["class_weights"] = {names[i]: round(weight, 4) for i, weight in enumerate(loss.class_weights.tolist())}
    for name, nothing in (("fl_gamma", 0.0), ("cls_pw", 1.0), ("obj_pw", 1.0), ("label_smoothing", 0.0)):
        if getattr(hyper, name) != nothing:
            notes[name] = getattr(hyper, name)
    return {"imbalance": notes} if notes else {}


def recipe_lines(config: Config, model: YOLO, loss: DetectionLoss, schedule: Schedule, counts: Tensor) -> list[str]:
    """What is out of the ordinary about a run's recipe, a line each."""
    lines = []
    if loss.class_weights is not None:
        classes = ", ".join(
            f"{model.names[i]} {weight:.2f} ({count} boxes)"
            for i, (weight, count) in enumerate(zip(loss.class_weights.tolist(), counts.tolist(), strict=True))
        )
        lines.append(f"class weights, frequency to the power of -{config.recipe.class_weights:g}: {classes}")
    if model.frozen:
        params = list(model.parameters())
        learned = sum(param.numel() for param in params if param.requires_grad)
        total = sum(param.numel() for param in params)
        numbers = ", ".join(map(str, model.frozen))
        lines.append(f"layers {numbers} are frozen: {learned:,} of {total:,} parameters learn and are exchanged")
        if not config.weights and not config.resume:
            lines.append("layers are frozen as they were initialised, at random: --weights would give them something to keep")
    if schedule.beyond_nominal > 1:
        lines.append(
            f"global batch {schedule.batch} is {schedule.beyond_nominal:g} times the nominal batch: steps grow by its square root "
            f"({math.sqrt(schedule.beyond_nominal):.2f}, learning rate {schedule.peak_lr:.4g}), warm-up takes {schedule.warmup_batches} batches"
        )
    if schedule.updates < FEW_UPDATES and schedule.full_accumulate > 1 and not config.weights:
        lines.append(
            f"{schedule.updates} updates are few to learn from scratch: optim.nominal_batch={schedule.batch} would make "
            f"{schedule.full_accumulate} times as many of the same images (README: Small data sets)"
        )
    return lines
