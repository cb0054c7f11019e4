"""The detection loss of YOLOv5, normalised so that the shares of a batch sum to the loss of the whole.

A label is matched to every anchor of about its own size, in the cell of its centre and in up to two neighbours of it; matched cells learn
the box (CIoU by default) and the class, all cells learn as objectness the IoU their box reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horoyolo.model.boxes import bbox_iou

# Weights of the layers' objectness, from the finest grid on: there are far more cells there, nearly all of them empty.
_BALANCE = {3: (4.0, 1.0, 0.4)}
_BALANCE_DEEP = (4.0, 1.0, 0.25, 0.06, 0.02)


class Matches(NamedTuple):
    """Label-anchor-cell matches of one layer, n of them."""

    image: Tensor  # (n,) index within this worker's images
    anchor: Tensor  # (n,)
    x: Tensor  # (n,) column of the cell
    y: Tensor  # (n,) row of the cell
    boxes_xywh: Tensor  # (n, 4) in cells, centre relative to the cell's corner
    label: Tensor  # (n,) class


class DetectionLoss(nn.Module):
    """Box, objectness and class loss of heads against labels.

    ``anchors`` (num_layers, num_anchors, 2) are in cells and the model's own tensor: anchors that are fitted or restored later count here too.
    ``box_loss`` is the overlap that boxes learn: ciou, diou or giou. ``class_weights`` (num_classes,) multiply what the boxes of each class
    cost as members of it (see `class_weights_from`). Gains are applied as given (see `scale_gains`); ``cls_pw`` and ``obj_pw`` weigh
    the positives of the two BCEs, ``anchor_t`` is the largest ratio between a label's side and its anchor's, ``fl_gamma`` above 0 turns
    both BCEs into focal losses.
    """

    anchors: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        anchors: Tensor,
        num_classes: int,
        box: float = 0.05,
        obj: float = 1.0,
        cls: float = 0.5,
        obj_pw: float = 1.0,
        cls_pw: float = 1.0,
        anchor_t: float = 4.0,
        label_smoothing: float = 0.0,
        fl_gamma: float = 0.0,
        box_loss: str = "ciou",
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors.detach(), persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.num_classes = num_classes
        self.gains = (box, obj, cls)
        self.obj_pw = obj_pw
        self.cls_pw = cls_pw
        self.anchor_t = anchor_t
        self.label_smoothing = label_smoothing
        self.fl_gamma = fl_gamma
        self.box_loss = box_loss
        self.balance = _BALANCE.get(len(anchors), _BALANCE_DEEP)[: len(anchors)]

    def count_positives(self, targets: Tensor, grids_hw: Sequence[tuple[int, int]]) -> Tensor:
        """Matches of each layer, (num_layers,) float32, from labels (M, 6) and grid sizes alone.

        `forward` takes the sum of these over workers. Labels may lie on another device than the anchors.
        """
        layers = zip(self.anchors.to(targets.device), grids_hw, strict=True)
        counts = [len(match_targets(targets, anchors, grid_hw, self.anchor_t).image) for anchors, grid_hw in layers]
        return torch.tensor(counts, dtype=torch.float32, device=targets.device)

    def forward(self, heads: Sequence[Tensor], targets: Tensor, positives_per_layer: Tensor, global_batch: int) -> Tensor:
        """This worker's share of the global batch's mean loss: (3,) float32 box, objectness, class, after gains.

        ``heads`` are this worker's (B, num_anchors, H, W, 5 + num_classes), B may be 0; ``targets`` (M, 6) its image index, class, x, y,
        w, h (normalised). ``positives_per_layer`` (num_layers,) and ``global_batch`` are those of all workers together: the results of
        all workers sum to the loss of the whole batch, whichever way it was shared out. What YOLOv5 back-propagates is the sum of the
        three times ``global_batch``. Computed in float32 whatever the heads' type.
        """
        return self.mean(self.layer_sums(heads, targets, global_batch), positives_per_layer)

    def mean(self, layer_sums: Sequence[Sequence[Tensor]], positives_per_layer: Tensor) -> Tensor:
        """The loss (3,) of what `layer_sums` gave, of one batch or added over several, whose matches are ``positives_per_layer`` (num_layers,)."""
        box_loss = obj_loss = cls_loss = positives_per_layer.new_zeros(())
        for (box_sum, obj_mean, cls_sum), positives in zip(layer_sums, positives_per_layer.clamp(min=1), strict=True):
            box_loss = box_loss + box_sum / positives
            obj_loss = obj_loss + obj_mean
            cls_loss = cls_loss + cls_sum / (positives * self.num_classes)
        box_gain, obj_gain, cls_gain = self.gains
        return torch.stack((box_loss * box_gain, obj_loss * obj_gain, cls_loss * cls_gain))

    def layer_sums(self, heads: Sequence[Tensor], targets: Tensor, global_batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer the sums over its matches of the box and the class loss, and this share of the mean objectness loss over ``global_batch``."""
        sums = []
        for head, anchors, balance in zip(heads, self.anchors, self.balance, strict=True):
            _, num_anchors, height, width, outputs = head.shape
            match = match_targets(targets, anchors, (height, width), self.anchor_t)
            # One row a cell and anchor, in the order of channels_last memory, where this is a view.
            rows = head.permute(0, 2, 3, 1, 4).reshape(-1, outputs)  # (B*H*W*num_anchors, outputs)
            index = ((match.image * height + match.y) * width + match.x) * num_anchors + match.anchor  # (n,)
            # The gradient of an embedding adds up doubly matched rows in a fixed order; that of rows[index] does not with several threads.
            matched = F.embedding(index, rows).float()  # (n, outputs)

            boxes_xywh = torch.cat((matched[:, 0:2].sigmoid() * 2 - 0.5, (matched[:, 2:4].sigmoid() * 2) ** 2 * anchors[match.anchor]), 1)
            iou = bbox_iou(boxes_xywh, match.boxes_xywh, self.box_loss)  # (n,)
            box_sum = (1 - iou).sum()

            wanted = _last_written(len(rows), index, iou.detach().clamp(min=0))  # (B*H*W*num_anchors,)
            cells = global_batch * height * width * num_anchors
            obj_mean = self._bce_sum(rows[:, 4].float(), wanted, self.obj_pw) / cells * balance

            cls_sum = box_sum.new_zeros(())
            if self.num_classes > 1:
                low, high = 0.5 * self.label_smoothing, 1 - 0.5 * self.label_smoothing
                row_weight = None if self.class_weights is None else self.class_weights[match.label][:, None]
                classes = F.one_hot(match.label, self.num_classes) * (high - low) + low  # (n, num_classes)
                cls_sum = self._bce_sum(matched[:, 5:], classes, self.cls_pw, row_weight)
            sums.append((box_sum, obj_mean, cls_sum))
        return sums

    def _bce_sum(self, logits: Tensor, wanted: Tensor, positive_weight: float, row_weight: Tensor | None = None) -> Tensor:
        weight = None if positive_weight == 1 else logits.new_tensor(positive_weight)
        if self.fl_gamma == 0:
            return F.binary_cross_entropy_with_logits(logits, wanted, row_weight, pos_weight=weight, reduction="sum")
        # Powers of float32 numbers have other last bits at the end of a buffer, where they are not taken several at a time, and the end is
        # elsewhere in each share of a batch. In float64 that is lost when the sum and the gradients are rounded.
        logits, wanted = logits.double(), wanted.double()
        bce = F.binary_cross_entropy_with_logits(logits, wanted, row_weight, pos_weight=weight, reduction="none")
        return (focal_weight(logits, wanted, self.fl_gamma) * bce).sum().float()


def focal_weight(logits: Tensor, wanted: Tensor, gamma: float, alpha: float = 0.25) -> Tensor:
    """alpha_t (1 - p_t)^gamma of the focal loss, for targets between 0 and 1 (Lin et al. 2017, Focal Loss, equation 5)."""
    scores = logits.sigmoid()
    p_t = wanted * scores + (1 - wanted) * (1 - scores)
    alpha_t = wanted * alpha + (1 - wanted) * (1 - alpha)
    return alpha_t * (1 - p_t) ** gamma


def class_weights_from(counts: Tensor, power: float) -> Tensor:
    """Weights (num_classes,) that fall with a class's number of boxes (num_classes,) to ``power``; their mean over all boxes is 1.

    0.5 evens out half of an imbalance on a logarithmic scale, 1 all of it.
    """
    weights = counts.double().clamp(min=1) ** -power
    return (weights * counts.sum() / (weights * counts).sum().clamp(min=torch.finfo(torch.float64).tiny)).float()


def match_targets(targets: Tensor, anchors: Tensor, grid_hw: tuple[int, int], anchor_t: float) -> Matches:
    """The matches of one layer: ``targets`` (M, 6) image, class, xywhn; ``anchors`` (num_anchors, 2) in cells.

    An anchor matches where neither side differs from the label's by a factor of ``anchor_t`` or more. Besides the cell of the centre, the
    neighbour across the nearer vertical and the one across the nearer horizontal border are taken, where the grid has them. The matches
    of an image keep their order whichever images stand beside it.
    """
    height, width = grid_hw
    size = targets.new_tensor([width, height])
    wh = targets[:, 4:6] * size  # (M, 2) in cells
    ratio = wh[None] / anchors[:, None]  # (num_anchors, M, 2)
    anchor, row = (torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t).nonzero(as_tuple=True)  # (k,)
    xy = targets[row, 2:4] * size  # (k, 2)
    xy_from_far = size - xy

    near_low = (xy % 1 < 0.5) & (xy > 1)  # (k, 2): left and upper neighbour
    near_high = (xy_from_far % 1 < 0.5) & (xy_from_far > 1)  # right and lower neighbour
    everywhere = torch.ones_like(near_low[:, :1])
    taken = torch.cat((everywhere, near_low, near_high), 1).T  # (5, k)
    shifts = targets.new_tensor([[0, 0], [-0.5, 0], [0, -0.5], [0.5, 0], [0, 0.5]])  # (5, 2)
    shift, entry = taken.nonzero(as_tuple=True)  # (n,)

    anchor, row, xy = anchor[entry], row[entry], xy[entry]
    cell = torch.minimum((xy + shifts[shift]).long(), size.long() - 1)  # (n, 2); a centre on the far border belongs to the last cell
    boxes_xywh = torch.cat((xy - cell, wh[row]), 1)
    return Matches(targets[row, 0].long(), anchor, cell[:, 0], cell[:, 1], boxes_xywh, targets[row, 1].long())


def scale_gains(box: float, obj: float, cls: float, num_layers: int, num_classes: int, img: int) -> tuple[float, float, float]:
    """Gains given for 3 layers, 80 classes and 640 px images, for others: box, obj, cls as YOLOv5's training scales them."""
    layers = 3 / num_layers
    return box * layers, obj * (img / 640) ** 2 * layers, cls * num_classes / 80 * layers


def _last_written(length: int, index: Tensor, values: Tensor) -> Tensor:
    """Zeros (length,) with ``values`` (n,) at ``index`` (n,); of several at one place the last, on every device."""
    order = torch.arange(1, len(index) + 1, device=index.device)
    last = torch.zeros(length, dtype=torch.long, device=index.device).scatter_reduce_(0, index, order, "amax")  # 1 + entry, 0: none
    return torch.cat((values.new_zeros(1), values))[last]
