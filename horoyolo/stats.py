"""``horoyolo data stats``: what is in a data set, and what of it the model sees once it is augmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from horoyolo.config import Config
from horoyolo.data.augment import scaled_hw
from horoyolo.data.build import build_sampler, build_train_data
from horoyolo.data.loader import collate_train
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.engine.build import build_model_for
from horoyolo.engine.recipe import settle_anchors
from horoyolo.files import write_json
from horoyolo.model.anchors import best_possible_recall
from horoyolo.report.plots import plot_batch, plot_boxes

AUGMENTED_IMAGES = 256
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Figures:
    """Images and boxes as the network gets them, in figures."""

    what: str
    images: int
    without_boxes: int
    boxes: int
    boxes_of_class: dict[str, int]
    images_of_class: dict[str, int]
    boxes_an_image: list[float]  # here and below: the quantiles of QUANTILES
    side_px: list[float]  # square root of a box's area
    aspect: list[float]  # width / height of a box
    image_aspect: list[float]
    anchor_recall: float  # part of the boxes within reach of an anchor
    nearest_anchor: dict[str, float]  # width x height in pixels -> part of the boxes that it fits best

    def lines(self) -> list[str]:
        """The figures in words."""
        low, middle, high = (f"{q:.0%}" for q in QUANTILES)
        lines = [
            f"{self.what}: {self.images} images, {self.without_boxes} of them without a box; {self.boxes} boxes",
            f"  {'class':>20}{'boxes':>10}{'of all':>9}{'images':>10}",
        ]
        for name, count in self.boxes_of_class.items():
            lines.append(f"  {name:>20}{count:>10}{count / max(self.boxes, 1):>9.1%}{self.images_of_class[name]:>10}")
        lines.append(f"  {'':>20}{low:>10}{middle:>9}{high:>10}")
        rows = {"boxes an image": self.boxes_an_image, "box side, px": self.side_px, "box width / height": self.aspect}
        for name, (a, b, c) in (rows | {"image width / height": self.image_aspect}).items():
            lines.append(f"  {name:>20}{a:>10.2f}{b:>9.2f}{c:>10.2f}")
        nearest = ", ".join(f"{size} {part:.0%}" for size, part in self.nearest_anchor.items())
        return [*lines, f"  anchors: {self.anchor_recall:.1%} of the boxes within reach; each fits best: {nearest}"]


def describe(
    what: str, labels: Sequence[np.ndarray], shapes_hw: np.ndarray, names: dict[int, str], anchors_wh: np.ndarray, anchor_t: float
) -> Figures:
    """Figures of images (n, 2) in pixels and their labels, n of (m, 5), class and box_xywhn; anchors (k, 2) in pixels."""
    counts = np.array([len(rows) for rows in labels])
    rows = np.concatenate([np.zeros((0, 5)), *labels])
    image = np.repeat(np.arange(len(labels)), counts)
    wh = rows[:, 3:5] * shapes_hw[image][:, ::-1]
    ratio = np.maximum(wh[:, None] / anchors_wh, anchors_wh / wh[:, None]).max(2)  # (boxes, k)
    nearest = np.bincount(ratio.argmin(1), minlength=len(anchors_wh)) / max(len(wh), 1)
    of_class = [rows[:, 0] == index for index in names]
    return Figures(
        what=what,
        images=len(labels),
        without_boxes=int((counts == 0).sum()),
        boxes=len(rows),
        boxes_of_class={name: int(own.sum()) for name, own in zip(names.values(), of_class, strict=True)},
        images_of_class={name: len(np.unique(image[own])) for name, own in zip(names.values(), of_class, strict=True)},
        boxes_an_image=_quantiles(counts),
        side_px=_quantiles(np.sqrt(wh.prod(1))),
        aspect=_quantiles(wh[:, 0] / wh[:, 1]),
        image_aspect=_quantiles(shapes_hw[:, 1] / shapes_hw[:, 0]),
        anchor_recall=best_possible_recall(wh, anchors_wh, anchor_t),
        nearest_anchor={f"{w:.0f}x{h:.0f}": float(part) for (w, h), part in zip(anchors_wh, nearest, strict=True)},
    )


def show_stats(config: Config, augmented: bool, out: Path | None, json_file: Path | None) -> list[Figures]:
    """Print figures of each split at the training size, with ``augmented`` also of the training images as the model sees them.

    Pictures go to the folder ``out``. Raises InputError as training does.
    """
    spec = load_data_spec(config.data, config.input.single_cls)
    splits = [scan_split(spec, name, strict=name != "test") for name in spec.splits_to_look_at()]
    splits = [split for split in splits if split.report.boxes]  # a test split may be without labels
    train = next((split for split in splits if split.name == "train"), None)
    model = build_model_for(config, spec.classes)
    if train and isinstance(model.table["anchors"], int):  # its table says how many, the boxes which
        settle_anchors(model, train, config)
    anchors_wh = model.anchors_px.flatten(0, 1).double().cpu().numpy()
    found = []

    def look(what: str, labels: Sequence[np.ndarray], shapes_hw: np.ndarray) -> None:
        found.append(describe(what, labels, shapes_hw, spec.classes, anchors_wh, config.hyp.anchor_t))
        print("\n".join(found[-1].lines()))
        if out is not None:
            wh = np.concatenate([np.zeros((0, 2)), *(rows[:, 3:5] * hw[::-1] for rows, hw in zip(labels, shapes_hw, strict=True))])
            plot_boxes(found[-1].boxes_of_class, found[-1].images_of_class, wh, anchors_wh, out / f"{what.replace(', ', '-')}.png")

    for split in splits:
        shapes = [scaled_hw((int(height), int(width)), config.img / max(height, width)) for height, width in split.shapes_hw]
        look(split.name, split.labels, np.array(shapes))
    if augmented:
        train = train or scan_split(spec, "train")
        dataset = build_train_data(config, train)
        batches = list(build_sampler(config, train, max(model.strides)).batches(0, 1))
        keys = [key for batch in batches for key in batch][:AUGMENTED_IMAGES]
        samples = [dataset[key] for key in keys]
        look("train, augmented", [sample.targets.numpy() for sample in samples], np.array([sample.image.shape[1:] for sample in samples]))
        if out is not None:
            first = collate_train(samples[: len(batches[0])], config.img)
            plot_batch(torch.as_tensor(first.images), first.targets, spec.classes, out / "samples.png")
    if json_file is not None:
        write_json(json_file, [asdict(figures) for figures in found])
    return found


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, QUANTILES)] if len(values) else [0.0] * len(QUANTILES)
