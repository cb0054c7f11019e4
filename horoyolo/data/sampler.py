"""Which sample comes next, for any number of workers: a function of the seed, the epoch and what of it was consumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Key(NamedTuple):
    """A training sample's identity: its image, and where in which epoch's order it stands, which seeds its augmentation."""

    epoch: int
    position: int
    index: int  # type: ignore[assignment]  # a field here, not the tuple's method


def share(count: int, rank: int, size: int) -> range:
    """This worker's contiguous part of range(count): sizes differ by one at most, first ranks have the larger ones, some may be empty."""
    quotient, rest = divmod(count, size)
    start = rank * quotient + min(rank, rest)
    return range(start, start + quotient + (rank < rest))


class Sampler:
    """Each epoch visits every sample once, in a random order, in global batches of `batch` (the last one may be smaller).

    Its state, `epoch` and `consumed` (images of the epoch that were used, over all workers), is all that another number of workers needs to
    go on.
    """

    def __init__(self, num_samples: int, batch: int, seed: int) -> None:
        self.num_samples = num_samples
        self.batch = batch
        self.seed = seed
        self.epoch = 0
        self.consumed = 0

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (num_samples,) of an epoch."""
        # The spawn key keeps this stream apart from those of samples, which are seeded by [seed, epoch, position].
        sequence = np.random.SeedSequence([self.seed, epoch], spawn_key=(0,))
        return np.random.default_rng(sequence).permutation(self.num_samples)

    def batches(self, rank: int, size: int) -> Iterator[list[Key]]:
        """This worker's share of each global batch from the state of this moment to the end of its epoch."""
        return self._batches(self.epoch, self.consumed, rank, size)

    def _batches(self, epoch: int, consumed: int, rank: int, size: int) -> Iterator[list[Key]]:
        order = self.order(epoch)
        for start in range(consumed, self.num_samples, self.batch):
            count = min(self.batch, self.num_samples - start)
            yield [Key(epoch, start + i, int(order[start + i])) for i in share(count, rank, size)]

    def global_batches_left(self) -> int:
        """Global batches from here to the end of the epoch."""
        return -(-(self.num_samples - self.consumed) // self.batch)

    def advance(self, images: int) -> None:
        """Count images, over all workers, as used."""
        if not 0 <= images <= self.num_samples - self.consumed:
            raise ValueError(f"{images} images can't be used up: {self.num_samples - self.consumed} of epoch {self.epoch} are left")
        self.consumed += images

    def next_epoch(self) -> None:
        """Start the next epoch."""
        self.epoch += 1
        self.consumed = 0

    def state_dict(self) -> dict[str, int]:
        """What any number of workers needs to go on."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.epoch = state["epoch"]
        self.consumed = state["consumed"]
