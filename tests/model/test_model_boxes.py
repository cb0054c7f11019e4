from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horoyolo.model import boxes
from horoyolo.model.boxes import (
    bbox_iou,
    box_iou,
    greedy_nms,
    non_max_suppression,
    unletterbox,
    xywh_to_xyxy,
    xywhn_to_xyxy,
    xyxy_to_xywh,
    xyxy_to_xywhn,
)

SEEDS = st.integers(0, 2**31)


def random_boxes_xywh(count: int, seed: int, spread: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat((torch.rand(count, 2, generator=generator) * spread, torch.rand(count, 2, generator=generator) * 40 + 1), 1)


def slow_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_nms(boxes_xyxy: Tensor, labels: list[int], threshold: float) -> list[int]:
    iou = box_iou(boxes_xyxy, boxes_xyxy)
    kept: list[int] = []
    for i in range(len(boxes_xyxy)):
        if not any(labels[i] == labels[j] and iou[j, i] > threshold for j in kept):
            kept.append(i)
    return kept


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_formats_go_there_and_back(seed: int) -> None:
    xywh = random_boxes_xywh(8, seed)
    torch.testing.assert_close(xyxy_to_xywh(xywh_to_xyxy(xywh)), xywh)
    xyxy = xywh_to_xyxy(xywh)
    torch.testing.assert_close(xywhn_to_xyxy(xyxy_to_xywhn(xyxy, 320, 200), 320, 200), xyxy)


def test_formats_by_hand() -> None:
    torch.testing.assert_close(xywh_to_xyxy(torch.tensor([10.0, 20, 4, 6])), torch.tensor([8.0, 17, 12, 23]))
    torch.testing.assert_close(xywhn_to_xyxy(torch.tensor([0.5, 0.5, 0.2, 0.1]), 100, 200), torch.tensor([40.0, 90, 60, 110]))


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_pairwise_iou_is_the_plain_one(seed: int) -> None:
    a, b = xywh_to_xyxy(random_boxes_xywh(5, seed)), xywh_to_xyxy(random_boxes_xywh(7, seed + 1))
    slow = torch.tensor([[slow_iou(p, q) for q in b.tolist()] for p in a.tolist()])
    torch.testing.assert_close(box_iou(a, b), slow, rtol=1e-4, atol=1e-6)


def test_iou_of_boxes_without_area_is_zero() -> None:
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert box_iou(point, point).item() == 0
    assert box_iou(torch.zeros(0, 4), point).shape == (0, 1)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_distances_only_lower_the_overlap(seed: int) -> None:
    a, b = random_boxes_xywh(16, seed), random_boxes_xywh(16, seed + 1)
    iou, giou, diou, ciou = (bbox_iou(a, b, kind) for kind in ("iou", "giou", "diou", "ciou"))
    torch.testing.assert_close(iou, box_iou(xywh_to_xyxy(a), xywh_to_xyxy(b)).diagonal(), rtol=1e-4, atol=1e-6)
    assert (giou <= iou + 1e-6).all()
    assert (giou > -1).all()
    assert (diou <= iou + 1e-6).all()
    assert (ciou <= diou + 1e-6).all()
    for kind in ("iou", "giou", "diou", "ciou"):
        torch.testing.assert_close(bbox_iou(a, a, kind), torch.ones(16), rtol=1e-4, atol=1e-4)


def test_ciou_by_hand() -> None:
    # 2x4 against 4x2 around the same centre: IoU 4/12; the angles differ by atan(2) - atan(1/2).
    a, b = torch.tensor([[0.0, 0, 2, 4]]), torch.tensor([[0.0, 0, 4, 2]])
    aspect = 4 / torch.pi**2 * (torch.tensor(2.0).atan() - torch.tensor(0.5).atan()) ** 2
    expected = 1 / 3 - aspect**2 / (aspect - 1 / 3 + 1)
    torch.testing.assert_close(bbox_iou(a, b)[0], expected)


def test_ciou_gradient_of_a_vanished_box_is_finite() -> None:
    a = torch.zeros(1, 4, requires_grad=True)
    bbox_iou(a, torch.tensor([[0.0, 0, 1, 1]])).sum().backward()
    assert a.grad.isfinite().all()


def test_unknown_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="known are iou, giou, diou, ciou"):
        bbox_iou(torch.ones(1, 4), torch.ones(1, 4), "siou")


@given(
    SEEDS,
    st.integers(0, 150),
    st.sampled_from([10.0, 60.0, 400.0]),
    st.sampled_from([0.0, 0.3, 0.6, 0.95]),
    st.integers(1, 4),
    st.sampled_from([4, 32, 256]),
)
@settings(max_examples=60, deadline=None)
def test_nms_is_the_greedy_one(seed: int, count: int, spread: float, threshold: float, num_labels: int, block: int) -> None:
    boxes_xyxy = xywh_to_xyxy(random_boxes_xywh(count, seed, spread))
    labels = torch.randint(0, num_labels, (count,), generator=torch.Generator().manual_seed(seed))
    expected = slow_nms(boxes_xyxy, labels.tolist(), threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "NMS_BLOCK", block)
        assert greedy_nms(boxes_xyxy, labels, threshold, count).tolist() == expected
        assert greedy_nms(boxes_xyxy, labels, threshold, 5).tolist() == expected[:5]
        assert greedy_nms(boxes_xyxy, None, threshold, count).tolist() == slow_nms(boxes_xyxy, [0] * count, threshold)


def test_nms_follows_a_chain_to_its_end() -> None:
    # Each box overlaps the next one only: every other one stays, decided one after the other.
    left = torch.arange(100.0) * 5
    chain_xyxy = torch.stack((left, left * 0, left + 10, left * 0 + 10), 1)
    assert greedy_nms(chain_xyxy, None, 0.2, 100).tolist() == list(range(0, 100, 2))


def predictions(rows: list[list[float]]) -> Tensor:
    return torch.tensor([rows])


TWO_CLASSES = [[50.0, 50, 20, 20, 0.9, 0.8, 0.6], [51.0, 50, 20, 20, 0.8, 0.1, 0.9], [150.0, 50, 20, 20, 0.5, 0.1, 0.2]]


def test_suppression_keeps_the_best_class_or_all_of_them() -> None:
    (best,) = non_max_suppression(predictions(TWO_CLASSES), conf_threshold=0.25)
    torch.testing.assert_close(best[:, 4:], torch.tensor([[0.72, 0], [0.72, 1]]))
    (every,) = non_max_suppression(predictions(TWO_CLASSES), conf_threshold=0.25, multi_label=True)
    torch.testing.assert_close(every[:, 4:], torch.tensor([[0.72, 0], [0.72, 1]]))  # class 1 of the first box meets that of the second
    (every,) = non_max_suppression(predictions(TWO_CLASSES[:1]), conf_threshold=0.25, multi_label=True)
    torch.testing.assert_close(every[:, 4:], torch.tensor([[0.72, 0], [0.54, 1]]))


def test_suppression_across_classes_and_of_unwanted_ones() -> None:
    (agnostic,) = non_max_suppression(predictions(TWO_CLASSES), class_agnostic=True)
    assert agnostic.shape == (1, 6)
    (wanted,) = non_max_suppression(predictions(TWO_CLASSES), classes=[1])
    torch.testing.assert_close(wanted[:, 4:], torch.tensor([[0.72, 1]]))  # the first box's class 1 has 0.54 and yields
    (nothing,) = non_max_suppression(predictions(TWO_CLASSES), classes=[])
    assert nothing.shape == (0, 6)


def test_suppression_gives_one_tensor_an_image() -> None:
    batch = torch.cat((predictions(TWO_CLASSES), torch.zeros(1, 3, 7)))
    assert [tuple(boxes.shape) for boxes in non_max_suppression(batch)] == [(2, 6), (0, 6)]
    assert non_max_suppression(torch.zeros(0, 3, 7)) == []


def test_suppression_takes_the_most_confident_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.cat(
        (torch.arange(40.0)[:, None] * 100, torch.full((40, 3), 20.0), torch.linspace(0.3, 0.9, 40)[:, None], torch.ones(40, 1)), 1
    )
    monkeypatch.setattr(boxes, "MAX_CANDIDATES", 7)
    (found,) = non_max_suppression(rows[None], conf_threshold=0.1)
    torch.testing.assert_close(found[:, 4], rows[:, 4].flip(0)[:7])
    (found,) = non_max_suppression(rows[None], conf_threshold=0.1, max_detections=3)
    torch.testing.assert_close(found[:, 4], rows[:, 4].flip(0)[:3])


@given(st.integers(20, 900), st.integers(20, 900), SEEDS)
@settings(max_examples=30, deadline=None)
def test_unletterbox_undoes_scaling_and_padding(width: int, height: int, seed: int) -> None:
    gain = min(320 / width, 320 / height)
    pad = torch.tensor([(320 - width * gain) / 2, (320 - height * gain) / 2] * 2)
    inside = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)) * torch.tensor([width, height, width, height])
    original_xyxy = torch.cat((torch.minimum(inside[:, :2], inside[:, 2:]), torch.maximum(inside[:, :2], inside[:, 2:])), 1)
    torch.testing.assert_close(unletterbox(original_xyxy * gain + pad, (320, 320), (height, width)), original_xyxy, rtol=1e-4, atol=1e-2)


def test_unletterbox_clips() -> None:
    beyond = unletterbox(torch.tensor([[-50.0, -50, 999, 999]]), (320, 320), (240, 480))
    torch.testing.assert_close(beyond, torch.tensor([[0.0, 0, 480, 240]]))
