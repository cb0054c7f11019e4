"""``--auto-batch``: every worker finds out how many images it can hold; the global batch is what all can, in equal shares."""

from __future__ import annotations

import copy
import logging
import math
import platform
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from horoyolo.config import AgreedError, Config
from horoyolo.data.shapes import LARGEST
from horoyolo.distributed.comm import Comm
from horoyolo.engine.build import build_loss
from horoyolo.engine.device import Numerics
from horoyolo.engine.memory import available_bytes, peak_bytes
from horoyolo.model.yolo import YOLO

log = logging.getLogger("horoyolo")

SHARE = 0.8  # of what is free: loaders, evaluation and fragmentation want some too
TRIED = (1, 2, 4, 8)  # images; more follow from these, since memory grows by the image
COPIES = 8  # of the weights' size: gradients, buckets, momentum, moving average, copies for checkpoints
BOXES = 8  # an image
FEWEST_STEPS = 16  # an epoch; larger batches than that would leave too few updates to learn by


class Room(NamedTuple):
    """What a worker found."""

    host: str
    images: int  # that it can hold
    budget_gb: float


def settle_batch(config: Config, comm: Comm, numerics: Numerics, model: YOLO, num_images: int) -> int:
    """The global batch for ``num_images`` to train on; every worker must call it (AgreedError: not even one image fits somewhere)."""
    workers = comm.allgather_object((platform.node(), str(numerics.device)))
    sharers = workers.count((platform.node(), str(numerics.device)))
    probe = _Probe(config, numerics, model)
    budget = SHARE * available_bytes(numerics.device) / sharers - COPIES * probe.weights_bytes
    comm.barrier()  # nobody begins to take memory before all have looked
    rooms = comm.allgather_object(Room(platform.node(), images_that_fit(probe.bytes_for, budget), budget / 1e9))
    return agreed_batch(rooms, num_images, config.optim.nominal_batch)


def agreed_batch(rooms: Sequence[Room], num_images: int, nominal_batch: int) -> int:
    """The largest useful global batch that gives no worker more than it can hold, the same number to each (AgreedError: there is none)."""
    least = min(rooms, key=lambda room: room.images)
    if not least.images:
        there = f"{least.budget_gb:.1f} GB of memory on {least.host}"
        raise AgreedError(f"--auto-batch: not one image fits into {there}; a smaller --img or model is wanted")
    useful = max(min(nominal_batch, num_images), num_images // FEWEST_STEPS, len(rooms))
    batch = min(least.images * len(rooms), useful // len(rooms) * len(rooms))
    tightest = f"{least.host} holds the fewest, {least.images} images in {least.budget_gb:.1f} GB"
    bound = "" if batch == least.images * len(rooms) else f"; more than the nominal batch would leave fewer than {FEWEST_STEPS} steps an epoch"
    log.info("auto-batch: %d images, %d on each of %d workers (%s%s)", batch, batch // len(rooms), len(rooms), tightest, bound)
    return batch


def images_that_fit(bytes_for: Callable[[int], int], budget: float) -> int:
    """How many images take no more than ``budget`` bytes, by what each one more of a few takes; 0: not one.

    ``bytes_for`` gives the peak of a number of images and may raise torch.OutOfMemoryError.
    """
    peaks: dict[int, int] = {}
    for images in TRIED:
        if len(peaks) > 1 and images > _extrapolated(peaks, budget):
            break
        try:
            peaks[images] = bytes_for(images)
        except torch.OutOfMemoryError:
            break
    if len(peaks) > 1:
        return _extrapolated(peaks, budget)
    return len(peaks)  # one fits and two do not, or none


def _extrapolated(peaks: dict[int, int], budget: float) -> int:
    (few, low), (more, high) = sorted(peaks.items())[-2:]
    an_image = max((high - low) / (more - few), 1.0)
    return max(math.floor(budget / an_image), 0)


class _Probe:
    """A training step of made-up images on a copy of the model, at the largest size that training will meet."""

    def __init__(self, config: Config, numerics: Numerics, model: YOLO) -> None:
        stride = max(model.strides)
        img = math.ceil(config.img * LARGEST / stride) * stride if config.input.multi_scale else config.img
        self._img = max(img, 2 * stride)  # BatchNorm takes no statistics of a single cell
        self._numerics = numerics
        self._model = copy.deepcopy(model).to(numerics.device, memory_format=numerics.memory_format).train()  # type: ignore[call-overload]
        self._loss = build_loss(config, self._model)
        self.weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())

    def bytes_for(self, images: int) -> int:
        """The peak of a step of so many images."""
        return peak_bytes(self._numerics.device, lambda: self._step(images))

    def _step(self, images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (images, 3, self._img, self._img), dtype=torch.uint8, generator=generator)
        targets = torch.rand(images * BOXES, 6, generator=generator) * 0.5 + 0.2
        targets[:, 0], targets[:, 1] = torch.arange(images).repeat_interleave(BOXES), 0
        grids = [(self._img // stride, self._img // stride) for stride in self._model.strides]
        positives = self._loss.count_positives(targets, grids).to(self._numerics.device)
        with self._numerics.autocast():
            heads = self._model(self._numerics.as_input(pixels))
        self._loss(heads, targets.to(self._numerics.device), positives, images).sum().backward()
        self._model.zero_grad()
