"""Learning rates, momentum and accumulation as functions of the images seen.

Nothing here depends on the number of workers: the global batch is the unit of progress.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from horoyolo.config import Hyper, Optim

SHORTEST_WARMUP_BATCHES = 100  # however small the data set


@dataclass(frozen=True)
class Rates:
    """What the optimizer is set to for one global batch."""

    lr: float  # of weights
    bias_lr: float
    momentum: float
    weight_decay: float  # of weights; scales and biases do not decay
    accumulate: int  # global batches an update


@dataclass(frozen=True)
class Schedule:
    """YOLOv5's recipe: a warm-up by global batch in which biases start fast and weights at zero, then a decay by epoch.

    The loss is summed over images, so that with plain SGD a step grows with the images of an update: up to the nominal batch, to which updates
    accumulate, ``lr0`` needs no scaling. Beyond it steps would grow in proportion; the noise of gradients, which bounds them, shrinks only by the
    square root (Krizhevsky 2014, One weird trick, section 5; Hoffer et al. 2017, Train longer, generalize better, section 4). So steps grow by
    the square root, and warm-up lasts as many times the images (Goyal et al. 2017, Accurate, Large Minibatch SGD, section 2.2).
    """

    hyper: Hyper
    optim: Optim
    epochs: int
    batch: int  # images in a global batch
    batches_per_epoch: int

    @property
    def beyond_nominal(self) -> float:
        """The global batch in nominal batches, 1 up to there and where there is none."""
        return max(self.batch / self.optim.nominal_batch, 1.0) if self.optim.nominal_batch else 1.0

    @property
    def peak_lr(self) -> float:
        """The learning rate before decay: ``lr0`` times the square-root rule's factor.

        Adam divides by the gradient's size: its steps do not grow by themselves, SGD's do in proportion.
        """
        return self.hyper.lr0 * self._rule

    @property
    def _rule(self) -> float:
        return 1 / math.sqrt(self.beyond_nominal) if self.optim.optimizer == "sgd" else math.sqrt(self.beyond_nominal)

    @property
    def clip_norm(self) -> float:
        """Largest global norm of an update's gradient; ``optim.clip_norm`` is meant for the nominal batch, and gradients are sums over images."""
        return self.optim.clip_norm * self.beyond_nominal

    @property
    def warmup_batches(self) -> int:
        """Global batches of warm-up; 0 when it is turned off."""
        if self.hyper.warmup_epochs == 0:
            return 0
        longer = math.sqrt(self.beyond_nominal)
        shortest = SHORTEST_WARMUP_BATCHES / self.beyond_nominal  # as many images as with the nominal batch
        return round(max(round(self.hyper.warmup_epochs * self.batches_per_epoch), shortest) * longer)

    @property
    def full_accumulate(self) -> int:
        """Global batches an update after warm-up: as many as make up the nominal batch."""
        return max(round(self.optim.nominal_batch / self.batch), 1)

    @property
    def updates(self) -> int:
        """Updates of the whole run, warm-up aside; the last batches of an epoch make one, however few they are."""
        return self.epochs * math.ceil(self.batches_per_epoch / self.full_accumulate)

    @property
    def weight_decay(self) -> float:
        """Weight decay scaled by the images of an update, as the loss is: a nominal batch decays by ``hyper.weight_decay``."""
        if not self.optim.nominal_batch:
            return self.hyper.weight_decay
        return self.hyper.weight_decay * self.batch * self.full_accumulate / self.optim.nominal_batch

    def decay(self, epoch: int) -> float:
        """The learning rate of an epoch as a part of ``lr0``, from 1 down to ``lrf``, linear or as half a cosine (arXiv 1812.01187)."""
        done = epoch / self.epochs
        left = (1 + math.cos(math.pi * done)) / 2 if self.optim.cos_lr else 1 - done
        return left * (1 - self.hyper.lrf) + self.hyper.lrf

    def at(self, epoch: int, step: int) -> Rates:
        """The rates of global batch ``step``, counted from the start of the run, that lies in ``epoch``."""
        lr = self.peak_lr * self.decay(epoch)
        if step >= self.warmup_batches:
            return Rates(lr, lr, self.hyper.momentum, self.weight_decay, self.full_accumulate)

        done = step / self.warmup_batches

        def warm(start: float, end: float) -> float:
            return start + (end - start) * done

        accumulate = max(1, round(warm(1, self.optim.nominal_batch / self.batch)))
        bias_lr = warm(self.hyper.warmup_bias_lr * self._rule, lr)
        momentum = warm(self.hyper.warmup_momentum, self.hyper.momentum)
        return Rates(warm(0, lr), bias_lr, momentum, self.weight_decay, accumulate)
