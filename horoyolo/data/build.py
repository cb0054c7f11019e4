"""From a run's configuration to its samples: which come next, and what they look like."""

from __future__ import annotations

import logging
import math
import platform
from dataclasses import replace

import numpy as np

from horoyolo.config import Config
from horoyolo.data.albumentation import load_pipeline
from horoyolo.data.balance import Balance
from horoyolo.data.cache import folders
from horoyolo.data.dataset import EvalDataset, TrainDataset
from horoyolo.data.pixels import NoRoom, PixelCache, disk_room, memory_room, open_cache
from horoyolo.data.sampler import Sampler
from horoyolo.data.scan import Split
from horoyolo.data.shapes import Shapes

log = logging.getLogger("horoyolo")


def build_sampler(config: Config, split: Split, stride: int) -> Sampler:
    """The sampler of a training split for a model of this largest stride."""
    given = config.input
    balance = None if given.sampling == "uniform" else Balance(split.labels, len(split.names), given.sampling)
    aspects = np.divide(*split.shapes_hw.T) if given.rect else None
    return Sampler(len(split), config.batch, config.seed, Shapes(config.img, stride, given.multi_scale, aspects), balance, split.content_hash)


def build_train_data(config: Config, split: Split) -> TrainDataset:
    """The training samples of a split. Raises InputError for a pipeline that can't be used."""
    hyper = replace(config.hyp, mosaic=0.0, mixup=0.0) if config.input.rect else config.hyp  # a mosaic is a square
    mosaic_until = config.epochs - config.input.close_mosaic if config.input.close_mosaic else math.inf
    pipeline = load_pipeline(config.input.albumentations) if config.input.albumentations else None
    if hyper.copy_paste and not split.outlines:
        log.warning("hyp.copy_paste = %g does nothing: it copies objects along their outlines, and no label here has one", hyper.copy_paste)
    dataset = TrainDataset(split, config.img, hyper, config.seed, mosaic_until, pipeline)
    dataset.cache = _cache(config, split, np.array([dataset.tile_hw(i) for i in range(len(split))]), f"train {config.img}")
    return dataset


def build_eval_data(config: Config, split: Split, stride: int) -> EvalDataset:
    """The images of a split as they are evaluated during training."""
    dataset = EvalDataset(split, config.img, stride)
    dataset.cache = _cache(config, split, np.array(dataset.shapes_hw), f"evaluate {config.img}")
    return dataset


def _cache(config: Config, split: Split, shapes_hw: np.ndarray, purpose: str) -> PixelCache | None:
    """The cache of a split's images that the configuration asks for; none where it doesn't, or where there is no room, which is said."""
    kind = config.input.cache
    if kind == "none":
        return None
    try:
        room = memory_room() if kind == "ram" else disk_room(folders(split.root))
        cache = open_cache(room, split.image_paths, shapes_hw, purpose)
    except NoRoom as error:
        log.warning("%s: no %s cache on %s, images are decoded as they come: %s", split.name, kind, platform.node(), error)
        return None
    log.info("%s: %s cache of %.2f GB for all workers of a host", split.name, kind, cache.num_bytes / 1e9)
    return cache


def describe_input(config: Config, sampler: Sampler, names: dict[int, str]) -> list[str]:
    """What is not as usual about the training samples, a line each."""
    lines = []
    if config.input.rect:
        lines.append("rectangular batches: images of like aspect ratio together, without mosaic and mixup")
    if config.input.multi_scale and sampler.shapes:
        lines.append(f"multi-scale: long sides up to {sampler.shapes.largest} px, which takes more memory than {config.img} px")
    if config.input.close_mosaic and not config.input.rect:
        lines.append(f"mosaic and mixup are off from epoch {max(config.epochs - config.input.close_mosaic, 0)} on")
    if config.input.albumentations:
        lines.append(f"albumentations: pipeline {config.input.albumentations}, before the colour jitter")
    if sampler.balance:
        seen = ", ".join(f"{names[i]} {times:.2f}" for i, times in enumerate(sampler.balance.boxes_seen()))
        lines.append(f"images drawn by {sampler.balance.by}; boxes an epoch shows, against each image once: {seen}")
    return lines
