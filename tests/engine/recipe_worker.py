"""A worker that trains a few steps with each option of data and recipe and saves what came of it; also the home of these options."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from horoyolo.config import Config, override
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.distributed.comm import Comm, open_comm
from horoyolo.engine.build import build_model_for, build_training
from horoyolo.engine.device import numerics_for
from horoyolo.engine.hooks import EpochRecord, Hook, StepRecord
from horoyolo.engine.stop import StopRequest
from horoyolo.engine.synchronise import synchronise
from horoyolo.engine.train import train

# Small, with a layer of every kind that training treats in its own way.
TABLE = """
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [16, 6, 4, 1]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 1], 1, Concat, [1]]
  - [-1, 1, Conv, [16, 3]]
  - [[5, 2], 1, Detect, [nc, anchors]]
"""

# Batches of 3, 3 and 1 images an epoch: a worker of four always lacks some. Every step is an update, so that the options act at once.
USUAL: dict[str, Any] = {"img": 64, "batch": 3, "epochs": 1, "comms.sync_bn": True, "optim.nominal_batch": 0, "workers": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "frozen backbone, ReLU": {"recipe.freeze": "3", "recipe.activation": "relu"},
    "frozen here and there, Hardswish": {"recipe.freeze": "0,5", "recipe.activation": "hardswish"},
    "slow backbone, LeakyReLU": {"optim.backbone_lr": 0.1, "recipe.activation": "leakyrelu"},
    "fitted anchors, DIoU": {"hyp.anchors": 2, "recipe.box_loss": "diou"},
    "GIoU, class weights": {"recipe.box_loss": "giou", "recipe.class_weights": 1.0},
    "focal": {"hyp.fl_gamma": 1.5},
    "positive weights, label smoothing": {"hyp.cls_pw": 0.5, "hyp.obj_pw": 0.7, "hyp.label_smoothing": 0.1},
    "large batch": {"optim.nominal_batch": 2},
    "accumulation": {"optim.nominal_batch": 6, "hyp.warmup_epochs": 0},
    "AdamW, clipping": {"optim.optimizer": "adamw", "hyp.lr0": 0.001, "optim.clip_norm": 0.1},
    "patience": {"recipe.patience": 1, "epochs": 5, "img": 32},
    "no augmentation": {"hyp.mosaic": 0, "hyp.scale": 0, "hyp.translate": 0, "hyp.fliplr": 0, "hyp.hsv_h": 0, "hyp.hsv_s": 0, "hyp.hsv_v": 0},
    "geometry": {"hyp.degrees": 10, "hyp.shear": 5, "hyp.perspective": 0.0005, "hyp.flipud": 0.5},
    "mixup": {"hyp.mixup": 0.5},
    "copy-paste": {"hyp.copy_paste": 1.0},
    "albumentations": {"input.albumentations": "pipeline.yaml"},
    "rect": {"input.rect": True},
    "multi-scale rect": {"input.multi_scale": True, "input.rect": True},
    "multi-scale, close mosaic": {"input.multi_scale": True, "input.close_mosaic": 1, "epochs": 2},
    "sampling classes": {"input.sampling": "classes"},
    "sampling images": {"input.sampling": "images", "epochs": 2},
    "ram cache": {"input.cache": "ram"},
    "disk cache": {"input.cache": "disk"},
}
CACHES = ("ram cache", "disk cache")  # which change nothing

PIPELINE = """
transform:
  __class_fullname__: Compose
  p: 1.0
  transforms:
  - {__class_fullname__: RandomBrightnessContrast, p: 0.7}
  - {__class_fullname__: Rotate, limit: [-15, 15], p: 0.7}
"""


class Collect(Hook):
    """Losses of steps, and epochs."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.epochs: list[int] = []

    def after_step(self, record: StepRecord, batch: Any) -> None:
        self.losses.append([record.box_loss, record.obj_loss, record.cls_loss, record.lr, record.update])

    def after_epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record.epoch)


def outcome(config: Config, comm: Comm) -> dict[str, Any]:
    """Losses, weights and what else a run of ``config`` ends with."""
    spec = load_data_spec(config.data)
    model = build_model_for(config, spec.classes)
    splits = scan_split(spec, "train"), scan_split(spec, "val")
    job = build_training(config, comm, numerics_for(torch.device("cpu"), "fp32"), model, *splits, num_local=comm.local_size())
    synchronise(job)
    if comm.rank() == 0:
        job.run.create(config)
    collected = Collect()
    train(job, [collected], StopRequest())
    job.exchange.close()
    exchanged = sum(bucket.flat.numel() for bucket in job.exchange.buckets)
    return {"losses": collected.losses, "epochs": collected.epochs, "weights": job.model.state_dict(), "exchanged": exchanged}


def fades(metrics: dict[str, Any]) -> float:
    """A score that falls after the second epoch."""
    return 1 - abs(metrics["epoch"] - 1) / 10


def main(out: Path) -> None:
    logging.getLogger("horoyolo").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    comm = open_comm()
    scenes = out.parent / "scenes"
    usual = override(Config(data=str(scenes / "data.yaml"), cfg=str(scenes / "table.yaml"), project=str(out / "runs")), USUAL, "test")
    os.chdir(scenes)  # where pipeline.yaml is
    options = {name: override(usual, {"name": name.replace(" ", "-").replace(",", ""), **values}, "test") for name, values in OPTIONS.items()}
    with patch("horoyolo.engine.train.fitness", fades):  # such small models score nothing
        torch.save({name: outcome(config, comm) for name, config in options.items()}, out / f"rank{comm.rank()}.pt")
    comm.barrier()
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
