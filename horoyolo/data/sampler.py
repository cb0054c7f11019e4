"""Which sample comes next, for any number of workers: a function of the seed, the epoch and what of it was consumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from horoyolo.data.balance import Balance
from horoyolo.data.shapes import Shapes

log = logging.getLogger("horoyolo")


class Key(NamedTuple):
    """A training sample's identity: its image, where in which epoch's order it stands, which seeds its augmentation, and its batch's shape."""

    epoch: int
    position: int
    index: int  # type: ignore[assignment]  # a field here, not the tuple's method
    hw: tuple[int, int] | None = None  # height and width; none: the training size's square


def share(count: int, rank: int, size: int) -> range:
    """This worker's contiguous part of range(count): sizes differ by one at most, first ranks have the larger ones, some may be empty."""
    quotient, rest = divmod(count, size)
    start = rank * quotient + min(rank, rest)
    return range(start, start + quotient + (rank < rest))


class Sampler:
    """Each epoch visits every sample once, in a random order, in global batches of `batch` (the last one may be smaller).

    With a `balance` some samples come more often and others less, in an epoch as long. Its state, `epoch` and `consumed` (images of the epoch
    that were used, over all workers), and the balance's, is all that another number of workers needs to go on.
    """

    def __init__(
        self, num_samples: int, batch: int, seed: int, shapes: Shapes | None = None, balance: Balance | None = None, content_hash: str = ""
    ) -> None:
        """``content_hash``: of the samples (``Split.content_hash``), by which the state of other ones is known."""
        self.num_samples = num_samples
        self.batch = batch
        self.seed = seed
        self.shapes = shapes
        self.balance = balance
        self.content_hash = content_hash
        self.epoch = 0
        self.consumed = 0

    def order(self, epoch: int) -> np.ndarray:
        """The samples (num_samples,) of an epoch: a permutation, but for a balance."""
        # The spawn key keeps this stream apart from those of samples, which are seeded by [seed, epoch, position].
        sequence = np.random.SeedSequence([self.seed, epoch], spawn_key=(0,))
        rng = np.random.default_rng(sequence)
        order = self.balance.draw(rng) if self.balance else rng.permutation(self.num_samples)
        return self.shapes.arrange(order) if self.shapes else order

    def batches(self, rank: int, size: int) -> Iterator[list[Key]]:
        """This worker's share of each global batch from the state of this moment to the end of its epoch."""
        return self._batches(self.epoch, self.consumed, rank, size)

    def _batches(self, epoch: int, consumed: int, rank: int, size: int) -> Iterator[list[Key]]:
        order = self.order(epoch)
        for start in range(consumed, self.num_samples, self.batch):
            count = min(self.batch, self.num_samples - start)
            hw = self.shapes.batch_hw(self.seed, epoch, start, order[start : start + count]) if self.shapes else None
            yield [Key(epoch, start + i, int(order[start + i]), hw) for i in share(count, rank, size)]

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

    def state_dict(self) -> dict[str, Any]:
        """What any number of workers needs to go on."""
        state: dict[str, Any] = {"epoch": self.epoch, "consumed": self.consumed, "content_hash": self.content_hash}
        return state | ({"balance": self.balance.state_dict()} if self.balance else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.epoch = state["epoch"]
        self.consumed = state["consumed"]
        if self.consumed and state.get("content_hash", self.content_hash) != self.content_hash:
            words = "images, sizes or labels are not those of the checkpoint: the rest of epoch %d is of another order, its first %d may come again"
            log.warning(words, self.epoch, self.consumed)
        if self.balance and "balance" in state:
            self.balance.load_state_dict(state["balance"])
