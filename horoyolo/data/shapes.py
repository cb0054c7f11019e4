"""The shape of each training batch: one square, squares of many sizes, or rectangles that fit the batch's images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SMALLEST, LARGEST = 0.5, 1.5  # parts of the training size that multi-scale training chooses between
WINDOW = 1024  # images that are sorted by aspect ratio together


@dataclass(frozen=True)
class Shapes:
    """Chooses the height and width of a global batch from the seed, the epoch, its first position and its images: the same on all workers."""

    img: int  # long side in pixels
    stride: int  # sides are multiples of it
    multi_scale: bool = False  # long sides from half to one and a half of `img`
    aspects: np.ndarray | None = None  # (n,) height / width of every image: batches are rectangles; None: squares

    def arrange(self, order: np.ndarray) -> np.ndarray:
        """An epoch's order (n,) with images of like aspect together, where batches are rectangles.

        Only neighbours change places, and how they do does not depend on the batch: a run that goes on with another one misses no image.
        Windows are sorted upwards and downwards in turn, so that a batch over two of them fits too. The sort is stable: images of one shape
        stay in random order.
        """
        if self.aspects is None:
            return order
        windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
        signs = (1 if i % 2 == 0 else -1 for i in range(len(windows)))
        return np.concatenate([w[np.argsort(sign * self.aspects[w], kind="stable")] for w, sign in zip(windows, signs, strict=True)])

    def batch_hw(self, seed: int, epoch: int, position: int, indices: np.ndarray) -> tuple[int, int]:
        """Height and width of the global batch of these images (b,), the first of which stands at ``position``."""
        side = self._side(seed, epoch, position)
        if self.aspects is None:
            return side, side
        aspects = self.aspects[indices]
        # Wide and tall images in one batch need the square.
        height, width = min(float(aspects.max()), 1.0), min(1 / float(aspects.min()), 1.0)
        return self._round_up(side * height), self._round_up(side * width)

    @property
    def largest(self) -> int:
        """The longest side that occurs."""
        return self._sides()[-1]

    def _side(self, seed: int, epoch: int, position: int) -> int:
        if not self.multi_scale:
            return self.img
        sequence = np.random.SeedSequence([seed, epoch, position], spawn_key=(1,))  # apart from the streams of orders and samples
        return int(np.random.default_rng(sequence).choice(self._sides()))

    def _sides(self) -> list[int]:
        if not self.multi_scale:
            return [self.img]
        first, last = math.ceil(SMALLEST * self.img / self.stride), math.floor(LARGEST * self.img / self.stride)
        return [number * self.stride for number in range(max(first, 1), last + 1)]

    def _round_up(self, side: float) -> int:
        return math.ceil(side / self.stride - 1e-6) * self.stride
