from __future__ import annotations

import numpy as np
import pytest

from horoyolo.report.draw import class_colour, draw_boxes


def test_drawing_leaves_the_image_alone_and_the_surest_box_on_top() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    box_xyxy = [20, 40, 80, 90]
    drawn = draw_boxes(image, [box_xyxy, box_xyxy], [0, 1], ["", ""])
    assert not image.any()
    assert tuple(drawn[90, 50]) == class_colour(0)


@pytest.mark.parametrize("box_xyxy", [(0, 0, 50, 30), (250, 0, 300, 200), (290, 190, 300, 200), (0, 195, 5, 200)])
def test_captions_stay_inside_the_image(box_xyxy: tuple[int, int, int, int]) -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    plain, captioned = (draw_boxes(image, [box_xyxy], [0], [caption]) for caption in ("", "basketball 0.99"))
    ys, xs = np.nonzero((plain != captioned).any(-1))
    width, height = np.ptp(xs), np.ptp(ys)
    assert width > 40  # the whole of it: as wide as anywhere else
    assert height >= 8
    middle = draw_boxes(image, [(100, 100, 150, 150)], [0], ["basketball 0.99"])
    ink = (captioned == 255).all(-1).sum()
    assert ink == pytest.approx((middle == 255).all(-1).sum(), rel=0.1)


def test_the_first_colours_differ() -> None:
    colours = np.array([class_colour(i) for i in range(12)])
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(12)
    assert distances.min() > 40
