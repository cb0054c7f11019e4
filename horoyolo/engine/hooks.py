"""Plug-ins of the training loop: what happens around steps and epochs without being part of the training itself.

Every worker calls its hooks; ``build_hooks`` gives the recording ones to rank 0 alone. A hook must not call a collective.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """What is known of one global batch; the row of steps.csv. Losses are per image, over the global batch, gains included."""

    step: int  # counted from 1
    epoch: int
    update: int  # updates done after this step
    images: int
    batch_crc: int  # sum modulo 2^32 of the CRC-32 of the batch's images
    box_loss: float
    obj_loss: float
    cls_loss: float
    loss: float
    lr: float
    data_s: float
    forward_s: float
    backward_s: float
    exchange_wait_s: float
    wire_bytes: int
    workers: int


@dataclass(frozen=True)
class EpochRecord:
    """What is known of one epoch: the row of results.csv."""

    epoch: int
    step: int
    images: int
    train_box_loss: float
    train_obj_loss: float
    train_cls_loss: float
    val_box_loss: float | None
    val_obj_loss: float | None
    val_cls_loss: float | None
    precision: float | None  # None: not evaluated in this epoch
    recall: float | None
    map50: float | None
    map50_95: float | None
    lr: float
    seconds: float


STEP_COLUMNS = [f.name for f in fields(StepRecord)]
EPOCH_COLUMNS = [f.name for f in fields(EpochRecord)]


class Hook:
    """Override what you need."""

    def before_train(self) -> None:
        """Called once, before the first step."""

    def after_change(self) -> None:
        """Called when the workers of an elastic job are together again: the run may have gone back to its last update."""

    def missed_step(self, record: StepRecord) -> None:
        """Called for a step that others completed where it failed on this worker."""

    def after_step(self, record: StepRecord, batch: Any) -> None:
        """Called after each global batch; ``batch`` is this worker's share."""

    def after_return(self) -> None:
        """Called when the run has gone back to an earlier state, to go on from there."""

    def after_epoch(self, record: EpochRecord) -> None:
        """Called after each epoch, once it was evaluated."""

    def after_train(self) -> None:
        """Called once at the end, also when the run was asked to stop or failed."""
