"""Boxes: formats, overlaps, suppression of doubles. Pure tensor functions.

xyxy: left, top, right, bottom; xywh: centre and size; both in pixels. xywhn: xywh in parts of the image's width and height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_CANDIDATES = 30000  # boxes of one image that enter the suppression, the most confident ones
NMS_BLOCK = 256  # boxes decided together: larger blocks waste work inside a block, smaller ones cost more calls


def xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """(..., 4) to (..., 4)."""
    centre, half = boxes_xywh[..., :2], boxes_xywh[..., 2:4] / 2
    return torch.cat((centre - half, centre + half), -1)


def xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) to (..., 4)."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:4]
    return torch.cat(((low + high) / 2, high - low), -1)


def xywhn_to_xyxy(boxes_xywhn: Tensor, width: float, height: float) -> Tensor:
    """Normalised boxes to pixels of an image of ``width`` x ``height``."""
    return xywh_to_xyxy(boxes_xywhn * boxes_xywhn.new_tensor([width, height, width, height]))


def xyxy_to_xywhn(boxes_xyxy: Tensor, width: float, height: float) -> Tensor:
    """Pixels of an image of ``width`` x ``height`` to normalised boxes."""
    return xyxy_to_xywh(boxes_xyxy) / boxes_xyxy.new_tensor([width, height, width, height])


def clip_boxes(boxes_xyxy: Tensor, width: float, height: float) -> Tensor:
    """The parts of the boxes that lie inside an image of ``width`` x ``height``."""
    x, y = boxes_xyxy[..., 0::2].clamp(0, width), boxes_xyxy[..., 1::2].clamp(0, height)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)


def unletterbox(boxes_xyxy: Tensor, letterboxed_hw: tuple[int, int], original_hw: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) on an image that was scaled to fit and padded evenly, to pixels of the original image, clipped to it."""
    (height, width), (original_height, original_width) = letterboxed_hw, original_hw
    gain = min(height / original_height, width / original_width)
    pad_x, pad_y = (width - original_width * gain) / 2, (height - original_height * gain) / 2
    return clip_boxes((boxes_xyxy - boxes_xyxy.new_tensor([pad_x, pad_y, pad_x, pad_y])) / gain, original_width, original_height)


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """IoU of each pair: (n, 4), (m, 4) to (n, m). Boxes without area have IoU 0."""
    a_left, a_top, a_right, a_bottom = a_xyxy[:, :, None].unbind(1)  # (n, 1) each
    b_left, b_top, b_right, b_bottom = b_xyxy[:, :4].T[:, None].unbind(0)  # (1, m) each
    width = (torch.minimum(a_right, b_right) - torch.maximum(a_left, b_left)).clamp_(min=0)
    height = (torch.minimum(a_bottom, b_bottom) - torch.maximum(a_top, b_top)).clamp_(min=0)
    inter = width.mul_(height)  # (n, m)
    union = (a_right - a_left) * (a_bottom - a_top) + (b_right - b_left) * (b_bottom - b_top) - inter
    return inter / union.clamp_(min=torch.finfo(union.dtype).tiny)


def bbox_iou(a_xywh: Tensor, b_xywh: Tensor, kind: str = "ciou", eps: float = 1e-7) -> Tensor:
    """Overlap of boxes row by row, (n, 4), (n, 4) to (n,), differentiable.

    ``kind`` is ``iou``, ``giou`` (Rezatofighi et al. 2019, algorithm 1), ``diou`` or ``ciou`` (Zheng et al. 2020, Distance-IoU Loss,
    equations 7 to 11).
    """
    a, b = xywh_to_xyxy(a_xywh), xywh_to_xyxy(b_xywh)
    a_low, a_high, b_low, b_high = a[:, :2], a[:, 2:], b[:, :2], b[:, 2:]
    inter = _area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    union = _area(a_xywh[:, 2:4]) + _area(b_xywh[:, 2:4]) - inter + eps
    iou = inter / union
    if kind == "iou":
        return iou
    enclosing_wh = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    if kind == "giou":
        enclosing = _area(enclosing_wh) + eps
        return iou - (enclosing - union) / enclosing
    centre_distance2 = ((a_xywh[:, :2] - b_xywh[:, :2]) ** 2).sum(-1)
    diou = iou - centre_distance2 / ((enclosing_wh**2).sum(-1) + eps)
    if kind == "diou":
        return diou
    if kind != "ciou":
        raise ValueError(f"unknown kind {kind!r}, known are iou, giou, diou, ciou")
    angle_a = torch.atan(a_xywh[:, 2] / (a_xywh[:, 3] + eps))
    angle_b = torch.atan(b_xywh[:, 2] / (b_xywh[:, 3] + eps))
    aspect = 4 / math.pi**2 * (angle_b - angle_a) ** 2
    with torch.no_grad():
        weight = aspect / (aspect - iou + (1 + eps)).clamp(min=eps)  # rounding can put the IoU of like boxes above 1
    return diou - weight * aspect


def _area(wh: Tensor) -> Tensor:
    return wh[:, 0] * wh[:, 1]


def non_max_suppression(
    predictions: Tensor,
    conf_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    multi_label: bool = False,
    class_agnostic: bool = False,
    max_detections: int = 300,
    classes: Sequence[int] | None = None,
) -> list[Tensor]:
    """Predictions (B, N, 5 + num_classes), as `YOLO.decode` gives them, to one tensor (n, 6) an image: x1, y1, x2, y2, confidence, class,
    by falling confidence.

    Confidence is objectness times class score and must exceed ``conf_threshold``. ``multi_label`` lets a box have every class that does,
    else the best one only. ``class_agnostic`` lets boxes of different classes suppress each other; ``classes`` are the only ones wanted.
    """
    with torch.no_grad():
        return [
            _suppress_image(image, conf_threshold, iou_threshold, multi_label, class_agnostic, max_detections, classes)
            for image in predictions
        ]


def _suppress_image(
    predictions: Tensor,
    conf_threshold: float,
    iou_threshold: float,
    multi_label: bool,
    class_agnostic: bool,
    max_detections: int,
    classes: Sequence[int] | None,
) -> Tensor:
    predictions = predictions[predictions[:, 4] > conf_threshold]  # (n, 5 + nc)
    scores = predictions[:, 5:] * predictions[:, 4:5]  # (n, nc)
    if classes is not None:
        wanted = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        wanted[list(classes)] = True
        scores = scores.masked_fill(~wanted, -1)
    if multi_label:
        rows, labels = (scores > conf_threshold).nonzero(as_tuple=True)
        confidences = scores[rows, labels]
    else:
        confidences, labels = scores.max(1)
        rows = (confidences > conf_threshold).nonzero()[:, 0]
        confidences, labels = confidences[rows], labels[rows]
    if len(confidences) > MAX_CANDIDATES:
        best = confidences.topk(MAX_CANDIDATES, sorted=False).indices
        rows, labels, confidences = rows[best], labels[best], confidences[best]
    order = confidences.argsort(descending=True, stable=True)
    rows, labels, confidences = rows[order], labels[order], confidences[order]
    boxes_xyxy = xywh_to_xyxy(predictions[rows, :4])
    kept = greedy_nms(boxes_xyxy, None if class_agnostic else labels, iou_threshold, max_detections)
    return torch.cat((boxes_xyxy[kept], confidences[kept, None], labels[kept, None].float()), 1)


def greedy_nms(boxes_xyxy: Tensor, labels: Tensor | None, iou_threshold: float, max_kept: int) -> Tensor:
    """Indices, rising, of the boxes (n, 4) that no kept box before them overlaps by more than ``iou_threshold``; at most ``max_kept``.

    Boxes come by falling confidence. With ``labels`` (n,) boxes of different labels do not meet. Decides a block of boxes at a time and
    stops as soon as it has enough.
    """
    kept = torch.empty(0, dtype=torch.long, device=boxes_xyxy.device)

    def overlapping(a: Tensor, b: Tensor) -> Tensor:  # (n, m)
        overlap = box_iou(boxes_xyxy[a], boxes_xyxy[b]) > iou_threshold
        return overlap if labels is None else overlap & (labels[a, None] == labels[None, b])

    for start in range(0, len(boxes_xyxy), NMS_BLOCK):
        block = torch.arange(start, min(start + NMS_BLOCK, len(boxes_xyxy)), device=boxes_xyxy.device)
        block = block[~overlapping(kept, block).any(0)]
        kept = torch.cat((kept, block[_first_come(overlapping(block, block))]))
        if len(kept) >= max_kept:
            break
    return kept[:max_kept]


def _first_come(overlap: Tensor) -> Tensor:
    """Which boxes (n,) the greedy rule keeps, from their overlaps (n, n).

    Box j is kept where no kept i < j overlaps it. Iterating this from "all kept" settles one more link of every chain of overlaps each
    time, so the fixed point is the sequential result (Zheng et al. 2020, Cluster-NMS).
    """
    earlier = overlap.triu(1).float()
    kept = torch.ones(len(overlap), device=overlap.device)
    while True:
        new = (kept @ earlier == 0).float()
        if torch.equal(new, kept):
            return kept.bool()
        kept = new
