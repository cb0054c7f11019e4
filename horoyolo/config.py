"""The settings of a run: one frozen dataclass tree, loaded, overridden, checked and saved here and nowhere else.

Defaults, then the hyper-parameter file, then flags, then ``--set key.path=value``; a later one wins. Values that depend on the number of
workers are not stored: they are computed where they are used.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class InputError(Exception):
    """The user gave something that can't be used: one line that says what, where and what would be right (exit status 2)."""


class AgreedError(InputError):
    """An InputError that every worker of the job raises, so that one of them tells it."""


AUTO_BATCH = -1  # the batch is found out when training starts


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
    anchors: float = 0.0  # anchors of each layer, rounded, fitted to the data; 0: the model's own
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
class Input:
    """How images are chosen, kept and changed on their way to the network, beside the hyper-parameters."""

    single_cls: bool = False  # all objects are of one class
    sampling: str = "uniform"  # each image once an epoch; classes: rare classes more often; images: rare and badly found ones more often
    rect: bool = False  # batches of images of like aspect, as rectangles; mosaic and mixup are off
    multi_scale: bool = False  # each global batch at a size from half to one and a half of img
    close_mosaic: int = 0  # last epochs without mosaic and mixup
    cache: str = "none"  # ram: decoded images in memory, once a host, shared by its workers; disk: in a file that also serves the next run
    albumentations: str = ""  # a pipeline as albumentations.save writes it (yaml)


@dataclass(frozen=True)
class Optim:
    """How gradients become new weights."""

    optimizer: str = "sgd"  # sgd, adam or adamw
    cos_lr: bool = False  # cosine instead of linear decay
    nominal_batch: int = 64  # images an update; 0: an update every global batch
    clip_norm: float = 10.0  # largest global norm of an update's gradient; 0: no clipping
    ema_decay: float = 0.9999
    backbone_lr: float = 1.0  # the backbone's learning rate as a part of the head's


@dataclass(frozen=True)
class Recipe:
    """What is learned, from which start, against which loss and for how long."""

    autoanchor: bool = True  # anchors that fit the boxes too badly are fitted anew
    activation: str = ""  # silu, relu, leakyrelu or hardswish; empty: what the model's table says
    box_loss: str = "ciou"  # ciou, diou or giou
    class_weights: float = 0.0  # each class counts by its frequency to the power of minus this: 0 alike, 1 rare ones as much as common ones
    freeze: str = ""  # layers that stay as they are: "10" the first ten, "0,1,5" these
    patience: int = 100  # epochs without a better score before training ends; 0: never


@dataclass(frozen=True)
class Comms:
    """How workers exchange gradients."""

    compression: str = "none"
    warmup_updates: int = 10  # sent as they are before onebit or powersgd starts, or auto looks for the quickest; topk reaches its ratio by then
    int8_block: int = 1024  # values with a scale of their own
    onebit_block: int = 64
    topk_ratio: float = 0.01  # share of the values that a worker sends
    powersgd_rank: int = 8
    bucket_mb: float = 6.0  # size of a gradient bucket in MB (10^6 bytes): small enough that the first leaves early
    overlap: str = "auto"  # buckets leave while backward runs: yes, no; auto: on GPUs, and on CPUs where measured to be quicker; not with sync_bn
    sync_bn: bool = False  # BatchNorm over the global batch


@dataclass(frozen=True)
class Config:
    """One training run."""

    data: str = ""  # data.yaml
    cfg: str = ""  # model name or yaml
    weights: str = ""  # where training starts; empty: from scratch
    img: int = 640  # side of the training images in pixels
    batch: int = 16  # images in a global batch, over all workers; -1: as many as all workers can hold
    epochs: int = 300
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False
    device: str = ""  # cpu, cuda or GPU numbers; empty: cuda where there is one
    workers: int = -1  # loader processes of each worker; -1: what its cores allow
    seed: int = 0
    precision: str = "auto"  # fp32, bf16, fp16; auto: bf16 where the device gains, else fp32
    resume: str = ""  # auto, a run folder or a checkpoint
    evaluate_every: int = 1  # epochs between evaluations; the last epoch is always evaluated, 0: it alone
    save_period: int = -1  # epochs between weights that stay as epochN.pt; below 1: last and best alone
    plots: bool = True  # pictures of the first batches and of the curves
    keep_checkpoints: int = 2  # the newest; that of the best epoch stays besides
    checkpoint_minutes: float = 10.0  # between checkpoints within an epoch; 0: at its end alone
    max_bad_share: float = 0.1  # of the images: a run does not start, or ends, where more can't be read or have corrupt labels
    hyp: Hyper = field(default_factory=Hyper)
    input: Input = field(default_factory=Input)
    optim: Optim = field(default_factory=Optim)
    recipe: Recipe = field(default_factory=Recipe)
    comms: Comms = field(default_factory=Comms)


def nearest_of(word: str, known: Iterable[str]) -> str:
    """The tail of an error line for an unknown ``word``: the nearest known one, or all of them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def read_yaml(path: str | Path, wanted: str) -> dict[str, Any]:
    """The mapping in a yaml file; ``wanted`` says in an error what the file should be (InputError: missing, unreadable, not a mapping)."""
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; {wanted} is wanted") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}; {wanted} is wanted") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise InputError(f"{path}{where}: not valid yaml ({reason}); {wanted} is wanted") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no keys with values; {wanted} is wanted")
    return content


def override(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """``config`` with each dotted key (``hyp.lr0``) set to its value, converted to the field's type.

    ``where`` says where the values come from. Raises InputError for an unknown key, naming the nearest known one, and for a value of
    another type.
    """
    for key, value in values.items():
        config = _replaced(config, key.split("."), value, key, where)
    return config


def _replaced(tree: Any, path: list[str], value: Any, key: str, where: str) -> Any:
    hints = typing.get_type_hints(type(tree))
    head, *rest = path
    if head not in hints:
        prefix = key[: len(key) - len(".".join(path))]
        raise InputError(f"{where}: unknown key {key!r}; {nearest_of(key, [prefix + name for name in hints])}")
    current = getattr(tree, head)
    if dataclasses.is_dataclass(current):
        if not rest:
            if not isinstance(value, Mapping):
                raise InputError(f"{where}: {key!r} is a section; its keys: {', '.join(typing.get_type_hints(type(current)))}")
            for name, item in value.items():
                current = _replaced(current, [str(name)], item, f"{key}.{name}", where)
            return dataclasses.replace(tree, **{head: current})
        return dataclasses.replace(tree, **{head: _replaced(current, rest, value, key, where)})
    if rest:
        raise InputError(f"{where}: unknown key {key!r}; {head!r} holds a single value")
    if key in _CHOICES and isinstance(value, str):
        value = value.lower()  # YOLOv5 writes SGD, Adam, AdamW
    return dataclasses.replace(tree, **{head: _converted(value, hints[head], key, where)})


def _converted(value: Any, wanted: type, key: str, where: str) -> Any:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    try:
        if wanted is bool:
            return value if isinstance(value, bool) else words[str(value).lower()]
        if wanted is int and not isinstance(value, bool):
            number = float(value)
            if number == int(number):
                return int(number)
        if wanted is float and not isinstance(value, bool):
            return float(value)
        if wanted is str and isinstance(value, (str, int, float)):
            return str(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    raise InputError(f"{where}: {key} = {value!r}; {names[wanted]} is wanted")


PRESETS = ("low", "med", "high", "no-augmentation", "voc")  # files in hyps/


def hyper_file(name: str) -> Path:
    """The hyper-parameter file that ``--hyp`` means: a file, else a preset, by its short name or YOLOv5's (InputError: neither)."""
    if Path(name).is_file():
        return Path(name)
    short = Path(name).name.removesuffix(".yaml").removeprefix("hyp.").removeprefix("scratch-").lower()
    if short not in PRESETS:
        raise InputError(f"--hyp {name}: no such file, and no preset; presets: {', '.join(PRESETS)}")
    return Path(__file__).parent / "hyps" / f"{short}.yaml"


def load_hyper(config: Config, name: str | Path) -> Config:
    """``config`` with the hyper-parameters of a preset or of a YOLOv5 ``hyp.yaml`` (InputError: unreadable, unknown keys, all of them named)."""
    path = hyper_file(str(name))
    values = read_yaml(path, "a YOLOv5 hyp.yaml")
    known = [f.name for f in dataclasses.fields(Hyper)]
    unknown = [f"{key!r} ({nearest_of(str(key), known)})" for key in values if key not in known]
    if unknown:
        raise InputError(f"hyper-parameter file {path}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}")
    return override(config, {f"hyp.{key}": value for key, value in values.items()}, f"hyper-parameter file {path}")


def frozen_layers(text: str) -> tuple[int, ...]:
    """The layers that ``recipe.freeze`` names, as in YOLOv5: one number is how many from the first on, several are these (InputError)."""
    try:
        numbers = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise InputError(f"recipe.freeze = {text!r}; a number of layers (10) or layers (0,1,5) are wanted")
    return tuple(range(numbers[0])) if len(numbers) == 1 else tuple(sorted(set(numbers)))


def dump(config: Config) -> str:
    """The whole configuration as yaml; ``load`` reads it back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def load(path: str | Path) -> Config:
    """The configuration saved with a run (InputError: unreadable, unknown key)."""
    return override(Config(), read_yaml(path, "the config.yaml of a run"), f"run configuration {path}")


_CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "optim.optimizer": ("sgd", "adam", "adamw"),
    "input.cache": ("none", "ram", "disk"),
    "input.sampling": ("uniform", "classes", "images"),
    "comms.compression": ("none", "fp16", "bf16", "int8", "onebit", "topk", "powersgd", "auto"),
    "comms.overlap": ("auto", "yes", "no"),
    "recipe.activation": ("", "silu", "relu", "leakyrelu", "hardswish"),
    "recipe.box_loss": ("ciou", "diou", "giou"),
}
_AT_LEAST: dict[str, float] = {
    "img": 32,
    "batch": AUTO_BATCH,
    "epochs": 1,
    "workers": -1,
    "seed": 0,
    "evaluate_every": 0,
    "save_period": -1,
    "keep_checkpoints": 1,
    "checkpoint_minutes": 0,
    "input.close_mosaic": 0,
    "optim.nominal_batch": 0,
    "optim.clip_norm": 0,
    "comms.bucket_mb": 0.001,
    "comms.warmup_updates": 0,
    "comms.int8_block": 8,
    "comms.onebit_block": 8,
    "comms.powersgd_rank": 1,
    "hyp.lr0": 0,
    "hyp.lrf": 0,
    "hyp.weight_decay": 0,
    "hyp.anchor_t": 1,
    "hyp.warmup_epochs": 0,
    "hyp.anchors": 0,
    "hyp.fl_gamma": 0,
    "optim.backbone_lr": 0,
    "recipe.class_weights": 0,
    "recipe.patience": 0,
}
_FROM_0_TO_1 = ("hyp.flipud", "hyp.fliplr", "hyp.mosaic", "hyp.mixup", "hyp.copy_paste", "hyp.label_smoothing", "optim.ema_decay")


def validate(config: Config) -> None:
    """Raises InputError at the first value that no run could use; looks at the configuration alone, opens no file."""
    if not config.data:
        raise InputError("no data set: --data takes a YOLOv5 data.yaml")
    if not config.cfg and not config.weights:
        raise InputError("no model: --cfg takes a name (yolov5n) or a model yaml, --weights a .pt file to start from")
    check_values(config)


def check_values(config: Config) -> None:
    """As ``validate``, whether or not a data set and a model are named."""

    def value_of(key: str) -> Any:
        tree: Any = config
        for name in key.split("."):
            tree = getattr(tree, name)
        return tree

    for key, choices in _CHOICES.items():
        if value_of(key) not in choices:
            raise InputError(f"{key} = {value_of(key)!r}; {nearest_of(str(value_of(key)), choices)}")
    for key, value in _numbers(config):
        if not math.isfinite(value):
            raise InputError(f"{key} = {value}; a finite number is wanted")
    for key, least in _AT_LEAST.items():
        if not value_of(key) >= least:
            raise InputError(f"{key} = {value_of(key)}; at least {least:g} is wanted")
    if config.batch == 0:
        raise InputError("batch = 0; at least 1 is wanted, or -1 for as many as all workers can hold")
    if config.img % 32:
        raise InputError(f"img = {config.img}; a multiple of 32 is wanted: {round(config.img / 32) * 32}")
    if not 0 < config.hyp.momentum < 1:
        raise InputError(f"hyp.momentum = {config.hyp.momentum}; above 0 and below 1 is wanted")
    if not 0 < config.comms.topk_ratio <= 1:
        raise InputError(f"comms.topk_ratio = {config.comms.topk_ratio}; a share above 0 and up to 1 is wanted")
    frozen_layers(config.recipe.freeze)
    if config.hyp.anchors and not config.recipe.autoanchor:
        raise InputError(f"hyp.anchors = {config.hyp.anchors:g} with --noautoanchor: new anchors are fitted to the data; leave one of the two out")
    for key in _FROM_0_TO_1:
        if not 0 <= value_of(key) <= 1:
            raise InputError(f"{key} = {value_of(key)}; from 0 to 1 is wanted")


def _numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of the configuration by its key."""
    for each in dataclasses.fields(tree):
        value = getattr(tree, each.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{prefix}{each.name}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{each.name}", value


def check_elastic(config: Config) -> None:
    """Raises InputError for what a job can't have whose workers come and go."""
    if config.batch == AUTO_BATCH:
        raise InputError("--batch -1 in an elastic job: workers that come later would find another size; name one (bench step --img lists what fits)")
