"""The settings of a run: one frozen dataclass tree, loaded, overridden, checked and saved here and nowhere else.

Defaults, then the hyper-parameter file, then flags, then ``--set key.path=value``; a later one wins. Values that depend on the number of workers are not stored: they are computed where they are used.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class InputError(Exception):
    """The user gave something that can't be used: one line that says what, where and what would be right (exit status 2)."""


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters, with the names and the defaults of YOLOv5's hyp.scratch-low.yaml."""

    lr0: float = 0.01  # learning rate after warm-up
    lrf: float = 0.01  # the last epoch's rate as a part of lr0
    momentum: float = 0.937  # SGD momentum, or Adam's beta1
    weight_decay: float = 0.0005
    warmup_epochs: float = 3.0
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    box: float = 0.05  # gain of the box loss
    cls: float = 0.5  # gain of the class loss, for 80 classes
    cls_pw: float = 1.0  # weight of positives in the class BCE
    obj: float = 1.0  # gain of the objectness loss, for 640 px
    obj_pw: float = 1.0  # weight of positives in the objectness BCE
    iou_t: float = 0.2  # read by no code, in YOLOv5 neither; its files carry it
    anchor_t: float = 4.0  # largest ratio of a box's side to its anchor's
    fl_gamma: float = 0.0  # focal loss
    label_smoothing: float = 0.0
    hsv_h: float = 0.015  # colour jitter, parts of the range
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0  # rotation, +/- degrees
    translate: float = 0.1  # +/- part of the image size
    scale: float = 0.5  # +/- gain
    shear: float = 0.0  # +/- degrees
    perspective: float = 0.0  # +/- part, 0 to 0.001
    flipud: float = 0.0  # probabilities from here on
    fliplr: float = 0.5
    mosaic: float = 1.0
    mixup: float = 0.0
    copy_paste: float = 0.0


@dataclass(frozen=True)
class Optim:
    """How gradients become new weights."""

    optimizer: str = "sgd"  # sgd or adamw
    cos_lr: bool = False  # cosine instead of linear decay
    nominal_batch: int = 64  # images an update; 0: an update every global batch
    clip_norm: float = 10.0  # largest global norm of an update's gradient; 0: no clipping
    ema_decay: float = 0.9999
    ema_tau: float = 2000.0  # updates over which the decay ramps up


@dataclass(frozen=True)
class Comms:
    """How workers exchange gradients."""

    compression: str = "none"
    bucket_mb: float = 8.0  # size of a gradient bucket in MB (10^6 bytes)
    sync_bn: bool = False  # BatchNorm over the global batch


@dataclass(frozen=True)
class Config:
    """One training run."""

    data: str = ""  # data.yaml
    cfg: str = ""  # model name or yaml
    weights: str = ""  # where training starts; empty: from scratch
    img: int = 640  # side of the training images in pixels
    batch: int = 16  # images in a global batch, over all workers
    epochs: int = 300
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False
    device: str = ""  # cpu, cuda or GPU numbers; empty: cuda where there is one
    workers: int = -1  # loader processes of each worker; -1: what its cores allow
    seed: int = 0
    precision: str = "auto"  # fp32, bf16, fp16; auto: bf16 where the device gains, else fp32
    resume: str = ""  # auto, a run folder or a checkpoint
    evaluate_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    keep_checkpoints: int = 2
    hyp: Hyper = field(default_factory=Hyper)
    optim: Optim = field(default_factory=Optim)
    comms: Comms = field(default_factory=Comms)
