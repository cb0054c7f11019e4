"""Images with rare or badly found classes drawn more often than others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SAMPLING = ("uniform", "classes", "images")
LEAST_GAIN = 0.01  # of a class that is found without fault: it must not be forgotten


class Balance:
    """How often each image is to be drawn, from the boxes in it.

    ``classes``: by the rarest of its classes, 1 / sqrt(share of the images that have it): LVIS' repeat factors (Gupta et al.,
    arXiv 1908.03195, section 4.2) with a threshold of 1. ``images``: as YOLOv5's --image-weights, by all its boxes, each counting
    (1 - AP)^2 / boxes of its class, with AP from the last evaluation. Images without a box keep their share.
    """

    def __init__(self, labels: Sequence[np.ndarray], num_classes: int, by: str) -> None:
        if by not in SAMPLING[1:]:
            raise ValueError(f"sampling {by!r}; known: {', '.join(SAMPLING[1:])}")
        counts = [np.bincount(rows[:, 0].astype(np.int64), minlength=num_classes) for rows in labels]
        self.counts = np.array(counts, np.int64).reshape(len(labels), num_classes)  # boxes of each image and class
        self.by = by
        self.ap = np.zeros(num_classes)

    def weights(self) -> np.ndarray:
        """The chance (n,) of each image, relative to the others'; the mean is 1."""
        has_boxes = self.counts.any(axis=1)
        weights = np.ones(len(self.counts))
        if self.by == "classes":
            share = (self.counts > 0).mean(axis=0)
            rarity = 1 / np.sqrt(np.where(share > 0, share, 1))
            weights[has_boxes] = (rarity * (self.counts[has_boxes] > 0)).max(axis=1)
        else:
            gain = np.maximum((1 - self.ap) ** 2, LEAST_GAIN) / np.maximum(self.counts.sum(axis=0), 1)
            weights[has_boxes] = self.counts[has_boxes] @ gain
        if has_boxes.any():
            weights[has_boxes] /= weights[has_boxes].mean()
        return weights

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """As many images (n,) as there are, in random order, each as often as its weight says, rounded up or down (systematic sampling)."""
        ends = np.cumsum(self.weights())
        picks = np.searchsorted(ends, (np.arange(len(ends)) + rng.random()) * (ends[-1] / len(ends)), side="right")
        return rng.permutation(picks.clip(max=len(ends) - 1))

    def boxes_seen(self) -> np.ndarray:
        """How many boxes of each class (num_classes,) an epoch shows on average, against each image once: 1 is as often, 2 twice as often."""
        return (self.weights() @ self.counts) / np.maximum(self.counts.sum(axis=0), 1)

    def state_dict(self) -> dict[str, Any]:
        return {"ap": self.ap.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ap = np.array(state["ap"])
