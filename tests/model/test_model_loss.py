from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horoyolo.model.boxes import bbox_iou
from horoyolo.model.loss import DetectionLoss, class_weights_from, focal_weight, match_targets, scale_gains
from horoyolo.model.weights import model_from_weights

ANCHORS = torch.tensor([[[1.2, 1.6], [2.0, 3.7]], [[1.5, 1.0], [2.5, 2.5]], [[1.0, 1.2], [3.0, 2.0]]])
GRIDS_HW = [(8, 10), (4, 5), (2, 3)]
NUM_CLASSES = 3


def random_targets(count: int, images: int, seed: int) -> Tensor:
    """Targets (count, 6); centres often lie on cell borders, where the choice of neighbours is delicate."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, max(images, 1), (count, 1), generator=generator).float()
    label = torch.randint(0, NUM_CLASSES, (count, 1), generator=generator).float()
    centre = torch.randint(0, 41, (count, 2), generator=generator) / 40
    size = torch.rand(count, 2, generator=generator) * 0.8 + 0.02
    return torch.cat((image, label, centre, size), 1)


def random_heads(images: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 2, h, w, 5 + NUM_CLASSES, generator=generator).requires_grad_() for h, w in GRIDS_HW]


def slow_matches(targets: Tensor, anchors: Tensor, grid_hw: tuple[int, int], anchor_t: float) -> set[tuple]:
    """The matching rule, one label, anchor and neighbour at a time."""
    height, width = grid_hw
    found = set()
    for image, label, x, y, w, h in targets.tolist():
        x, y, w, h = (float(np.float32(v) * np.float32(s)) for v, s in ((x, width), (y, height), (w, width), (h, height)))
        for number, (anchor_w, anchor_h) in enumerate(anchors.tolist()):
            if max(w / anchor_w, anchor_w / w, h / anchor_h, anchor_h / h) >= anchor_t:
                continue
            cells = [(int(x), int(y))]
            if x % 1 < 0.5 and x > 1:
                cells.append((int(x - 0.5), int(y)))
            if y % 1 < 0.5 and y > 1:
                cells.append((int(x), int(y - 0.5)))
            if (width - x) % 1 < 0.5 and width - x > 1:
                cells.append((int(x + 0.5), int(y)))
            if (height - y) % 1 < 0.5 and height - y > 1:
                cells.append((int(x), int(y + 0.5)))
            for column, row in cells:
                found.add((int(image), number, min(column, width - 1), min(row, height - 1), int(label), round(x, 3), round(y, 3)))
    return found


@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([1.5, 4.0]))
@settings(max_examples=40, deadline=None)
def test_matches_are_those_of_the_rule(seed: int, count: int, anchor_t: float) -> None:
    targets = random_targets(count, 3, seed)
    for anchors, grid_hw in zip(ANCHORS, GRIDS_HW, strict=True):
        match = match_targets(targets, anchors, grid_hw, anchor_t)
        found = {
            (image, anchor, x, y, label, round(x + box[0], 3), round(y + box[1], 3))
            for image, anchor, x, y, box, label in zip(*(field.tolist() for field in match), strict=True)
        }
        assert found == slow_matches(targets, anchors, grid_hw, anchor_t)


def share_out(targets: Tensor, sizes: list[int]) -> list[Tensor]:
    shares, start = [], 0
    for size in sizes:
        share = targets[(targets[:, 0] >= start) & (targets[:, 0] < start + size)].clone()
        share[:, 0] -= start
        shares.append(share)
        start += size
    return shares


@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_shares_sum_to_the_loss_of_the_batch(seed: int, sizes: list[int], count: int) -> None:
    images = sum(sizes)
    targets = random_targets(count if images else 0, images, seed)
    options = {"box_loss": ["ciou", "diou", "giou"][seed % 3], "fl_gamma": seed % 2 * 1.5, "class_weights": torch.tensor([0.5, 1.0, 3.0])}
    loss = DetectionLoss(ANCHORS, NUM_CLASSES, label_smoothing=0.1, cls_pw=0.7, obj_pw=1.3, **options)
    whole_heads = random_heads(images, seed)
    share_heads = [[part.detach().requires_grad_() for part in head.split(sizes)] for head in whole_heads]
    positives = loss.count_positives(targets, GRIDS_HW)

    whole = loss(whole_heads, targets, positives, max(images, 1))
    shares = share_out(targets, sizes)
    torch.testing.assert_close(sum(loss.count_positives(share, GRIDS_HW) for share in shares), positives)
    components = [loss([head[i] for head in share_heads], share, positives, max(images, 1)) for i, share in enumerate(shares)]
    torch.testing.assert_close(sum(components), whole, rtol=1e-5, atol=1e-6)

    whole.sum().backward()
    sum(components).sum().backward()
    for head, parts in zip(whole_heads, share_heads, strict=True):
        # Alike to the bit: which of several labels in a cell counts does not depend on the other images.
        assert torch.equal(torch.cat([part.grad for part in parts]), head.grad)


def test_nothing_to_learn_from() -> None:
    loss = DetectionLoss(ANCHORS, NUM_CLASSES)
    nothing = torch.zeros(0, 6)
    assert loss.count_positives(nothing, GRIDS_HW).tolist() == [0, 0, 0]
    heads = random_heads(2, 0)
    box, obj, cls = loss(heads, nothing, torch.zeros(3), 2)
    assert (box, cls) == (0, 0)
    assert obj > 0
    no_images = random_heads(0, 0)
    components = loss(no_images, nothing, torch.ones(3), 2)
    components.sum().backward()
    assert components.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_heads_are_computed_in_float32(dtype: torch.dtype) -> None:
    loss, targets = DetectionLoss(ANCHORS, NUM_CLASSES), random_targets(10, 2, 1)
    positives = loss.count_positives(targets, GRIDS_HW)
    halves = [head.detach().to(dtype).requires_grad_() for head in random_heads(2, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(halves, targets, positives, 2)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss([head.detach().float() for head in halves], targets, positives, 2))
    got.sum().backward()
    assert all(head.grad.isfinite().all() for head in halves)


def test_the_layout_of_the_heads_does_not_matter() -> None:
    loss, targets, heads = DetectionLoss(ANCHORS, NUM_CLASSES), random_targets(10, 2, 2), random_heads(2, 2)
    positives = loss.count_positives(targets, GRIDS_HW)
    turned = [head.detach().permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4).requires_grad_() for head in heads]
    a, b = loss(heads, targets, positives, 2), loss(turned, targets, positives, 2)
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(heads, turned, strict=True))


def test_perfect_boxes_cost_nothing() -> None:
    # The head decodes to the label itself and is certain of object and class.
    anchors = torch.tensor([[[2.0, 2.0]]])
    targets = torch.tensor([[0, 1, 4.5 / 10, 4.5 / 10, 0.2, 0.2]])  # in the middle of a cell of a 10 x 10 grid: matched there alone
    loss = DetectionLoss(anchors, 2)
    head = torch.full((1, 1, 10, 10, 7), -20.0)
    head[0, 0, 4, 4] = torch.tensor([0.0, 0, 0, 0, 20, -20, 20])
    positives = loss.count_positives(targets, [(10, 10)])
    assert positives.tolist() == [1]
    torch.testing.assert_close(loss([head], targets, positives, 1), torch.zeros(3), rtol=0, atol=1e-6)


def test_one_class_has_no_class_loss() -> None:
    targets = random_targets(6, 2, 3)
    targets[:, 1] = 0
    loss = DetectionLoss(ANCHORS, 1)
    heads = [head[..., :6] for head in random_heads(2, 3)]
    assert loss(heads, targets, loss.count_positives(targets, GRIDS_HW), 2)[2] == 0


def test_focal_weight_by_hand_and_its_effect() -> None:
    logits, wanted = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    sure = torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(focal_weight(logits, wanted, 1.5), torch.stack((0.25 * torch.tensor(0.5) ** 1.5, 0.75 * sure**1.5)))
    targets, heads = random_targets(8, 2, 4), random_heads(2, 4)
    plain, focal = DetectionLoss(ANCHORS, NUM_CLASSES), DetectionLoss(ANCHORS, NUM_CLASSES, fl_gamma=1.5)
    positives = plain.count_positives(targets, GRIDS_HW)
    a, b = plain(heads, targets, positives, 2), focal(heads, targets, positives, 2)
    assert a[0] == b[0]
    assert (b[1:] < a[1:]).all()


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.floats(0, 1))
def test_class_weights_fall_with_the_number_of_boxes(counts: list[int], power: float) -> None:
    boxes = torch.tensor(counts)
    weights = class_weights_from(boxes, power).double()
    if sum(counts):
        assert float((weights * boxes).sum() / boxes.sum()) == pytest.approx(1, rel=1e-5)
    for a, b in itertools.pairwise(sorted(range(len(counts)), key=counts.__getitem__)):
        ratio = (max(counts[b], 1) / max(counts[a], 1)) ** power
        assert float(weights[a]) == pytest.approx(float(weights[b]) * ratio, rel=1e-5)


def test_class_weights_multiply_what_the_boxes_of_a_class_cost() -> None:
    targets, heads = random_targets(9, 2, 5), random_heads(2, 5)
    plain, weighted = DetectionLoss(ANCHORS, NUM_CLASSES), DetectionLoss(ANCHORS, NUM_CLASSES, class_weights=torch.tensor([1.0, 2.0, 5.0]))
    positives = plain.count_positives(targets, GRIDS_HW)
    costs = []
    for label in range(NUM_CLASSES):  # of the boxes of one class, over the positives of all
        own = targets[targets[:, 1] == label]
        costs.append(plain(heads, own, positives, 2)[2])
    a, b = plain(heads, targets, positives, 2), weighted(heads, targets, positives, 2)
    torch.testing.assert_close(a[2], costs[0] + costs[1] + costs[2])
    torch.testing.assert_close(b[2], costs[0] + 2 * costs[1] + 5 * costs[2])
    assert torch.equal(a[:2], b[:2])


@pytest.mark.parametrize("kind", ["ciou", "diou", "giou"])
def test_the_box_loss_is_the_chosen_overlap(kind: str) -> None:
    """One label matched once, worked out by hand from `bbox_iou`."""
    anchors, targets = torch.tensor([[[2.0, 2.0]]]), torch.tensor([[0, 0, 0.45, 0.45, 0.3, 0.15]])
    loss = DetectionLoss(anchors, 1, box=1.0, box_loss=kind)
    head = torch.zeros(1, 1, 10, 10, 6)  # decodes to the cell's centre and the anchor's size
    box, *_ = loss([head], targets, loss.count_positives(targets, [(10, 10)]), 1)
    overlap = bbox_iou(torch.tensor([[0.5, 0.5, 2.0, 2.0]]), torch.tensor([[0.5, 0.5, 3.0, 1.5]]), kind)
    assert float(box) == pytest.approx(1 - float(overlap), rel=1e-5)


def test_anchors_that_change_later_count() -> None:
    anchors = ANCHORS.clone()
    loss, targets = DetectionLoss(anchors, NUM_CLASSES), random_targets(10, 2, 6)
    anchors.copy_(ANCHORS * 1.5)
    fresh = DetectionLoss(ANCHORS * 1.5, NUM_CLASSES)
    assert torch.equal(loss.count_positives(targets, GRIDS_HW), fresh.count_positives(targets, GRIDS_HW))


def test_gains_scale_as_stated() -> None:
    assert scale_gains(0.05, 1.0, 0.5, 3, 80, 640) == (0.05, 1.0, 0.5)
    assert scale_gains(0.05, 1.0, 0.5, 4, 20, 1280) == pytest.approx((0.0375, 3.0, 0.09375))


def test_components_and_gradients_are_the_public_ones(shared: Path) -> None:
    golden = np.load(shared / "golden" / "loss_train.npz")
    notes = json.loads((shared / "golden" / "loss_train.json").read_text())
    model, _ = model_from_weights(shared / "weights" / "yolov5n_coco.pt")
    model.train()
    hyper = {name: notes["hyp"][name] for name in ("box", "obj", "cls", "obj_pw", "cls_pw", "anchor_t", "label_smoothing", "fl_gamma")}
    loss = DetectionLoss(model.anchors, model.num_classes, **hyper)

    heads = model(torch.from_numpy(golden["images_rgb_uint8"]).float() / 255)
    targets = torch.from_numpy(golden["targets"])
    positives = loss.count_positives(targets, [(head.shape[2], head.shape[3]) for head in heads])
    components = loss(heads, targets, positives, len(heads[0]))
    total = components.sum() * len(heads[0])
    torch.testing.assert_close(components.detach(), torch.from_numpy(golden["lbox_lobj_lcls"]), rtol=1e-4, atol=0)
    torch.testing.assert_close(total.detach(), torch.from_numpy(golden["loss_times_batch"])[0], rtol=1e-4, atol=0)

    total.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(notes["grad_norms"], rel=1e-3)
