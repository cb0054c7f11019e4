"""The flags of ``train``: what each sets in the configuration, and the configuration that all of a command's words mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from horoyolo import config as configuration
from horoyolo.config import Config, InputError


@dataclass(frozen=True)
class Flag:
    """A flag of ``train`` and the configuration key that it sets."""

    names: tuple[str, ...]
    key: str
    help: str
    switch: bool = False  # takes no value
    means: Any = True  # what a switch sets
    several: bool = False  # takes several values
    optional: str | None = None  # what the flag means without a value


TRAIN_FLAGS = (
    Flag(("--data",), "data", "YOLOv5 data.yaml"),
    Flag(("--cfg",), "cfg", "model: yolov5n s m l x, n6 to x6, or a YOLOv5 model yaml"),
    Flag(("--weights",), "weights", "start from a .pt of this project or of YOLOv5"),
    Flag(("--img", "--imgsz", "--img-size"), "img", "side of the training images in pixels"),
    Flag(("--batch", "--batch-size"), "batch", "images in a global batch, over all workers"),
    Flag(("--auto-batch",), "batch", "a global batch of as many images as all workers can hold; the same as --batch -1", switch=True, means=-1),
    Flag(("--epochs",), "epochs", "passes over the training images"),
    Flag(("--project",), "project", "folder of runs"),
    Flag(("--name",), "name", "folder of this run; a number is added where it is taken"),
    Flag(("--exist-ok",), "exist_ok", "use the folder even if it is taken", switch=True),
    Flag(("--device",), "device", "cpu, cuda or GPU numbers such as 0,1"),
    Flag(("--workers",), "workers", "loader processes of each worker; -1: what its cores allow"),
    Flag(("--seed",), "seed", "seed of everything random"),
    Flag(("--sync-bn",), "comms.sync_bn", "BatchNorm over the global batch", switch=True),
    Flag(("--resume",), "resume", "auto (go on with --name if it is there), a run folder, a checkpoint; bare: newest run", optional="newest"),
    Flag(("--compression",), "comms.compression", "how gradients are compressed: none, fp16, bf16, int8, onebit, topk, powersgd, auto"),
    Flag(("--precision",), "precision", "fp32, bf16, fp16 (GPU) or auto"),
    Flag(("--optimizer",), "optim.optimizer", "sgd, adam or adamw"),
    Flag(("--cos-lr",), "optim.cos_lr", "cosine instead of linear decay", switch=True),
    Flag(("--label-smoothing",), "hyp.label_smoothing", "0 to 1"),
    Flag(("--single-cls",), "input.single_cls", "all objects are of one class, item", switch=True),
    Flag(("--sampling",), "input.sampling", "uniform, or draw rare classes (classes) or rare and badly found ones (images) more often"),
    Flag(("--image-weights",), "input.sampling", "the same as --sampling images", switch=True, means="images"),
    Flag(("--rect",), "input.rect", "rectangular batches of images of like aspect, without mosaic", switch=True),
    Flag(("--multi-scale",), "input.multi_scale", "each global batch at a size from half to one and a half of --img", switch=True),
    Flag(("--close-mosaic",), "input.close_mosaic", "last epochs without mosaic and mixup"),
    Flag(("--cache",), "input.cache", "keep decoded images, once a host: ram (also meant by the bare flag) or disk", optional="ram"),
    Flag(("--albumentations",), "input.albumentations", "a pipeline as albumentations.save writes it, yaml"),
    Flag(("--freeze",), "recipe.freeze", "layers that stay as they are: 10 (the first ten) or 0 1 5 (these)", several=True),
    Flag(("--patience",), "recipe.patience", "epochs without a better score before training ends; 0: never"),
    Flag(("--noval",), "evaluate_every", "evaluate the last epoch alone", switch=True, means=0),
    Flag(("--save-period",), "save_period", "epochs between weights that stay, weights/epochN.pt; below 1: last and best alone"),
    Flag(("--noplots",), "plots", "no pictures", switch=True, means=False),
    Flag(("--noautoanchor",), "recipe.autoanchor", "take the model's anchors even where they fit the boxes badly", switch=True, means=False),
)

def describe_train(parser: argparse.ArgumentParser) -> None:
    """The flags of ``train``, which ``data stats`` takes too."""
    for flag in TRAIN_FLAGS:
        options: dict[str, Any] = {"dest": flag.key, "help": flag.help, "default": argparse.SUPPRESS}
        if flag.switch:
            options |= {"action": "store_const", "const": flag.means}
        elif flag.several:
            options["nargs"] = "+"
        elif flag.optional:
            options |= {"nargs": "?", "const": flag.optional}
        parser.add_argument(*flag.names, **options)
    presets = ", ".join(configuration.PRESETS)
    parser.add_argument("--hyp", metavar="YAML|NAME", default="", help=f"hyper-parameter file of YOLOv5, or a preset: {presets}")
    parser.add_argument("--elastic", action="store_true", help="workers may come and go; launch --min-np adds it")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="any other setting, such as hyp.lr0=0.02")


def train_config(parsed: argparse.Namespace) -> Config:
    """The validated configuration that the words of ``train`` mean: of the resumed run, then file, flags, ``--set`` (InputError)."""
    from horoyolo.engine.runs import resumed_folder

    given = {flag.key: getattr(parsed, flag.key) for flag in TRAIN_FLAGS if hasattr(parsed, flag.key)}
    given |= {key: ",".join(value) for key, value in given.items() if isinstance(value, list)}
    config = Config()
    folder = resumed_folder(_overridden(config, given, parsed.set))
    if folder is not None:
        config = configuration.load(folder / "config.yaml")
        if given.get("batch") in (configuration.AUTO_BATCH, str(configuration.AUTO_BATCH)):
            del given["batch"]  # the run goes on with what was found
    if parsed.hyp:
        config = configuration.load_hyper(config, parsed.hyp)
    config = _overridden(config, given, parsed.set)
    configuration.validate(config)
    return config


def _overridden(config: Config, given: Mapping[str, Any], words: Sequence[str]) -> Config:
    """``config`` with what flags gave, and then what the ``words`` of ``--set`` say (InputError)."""
    config = configuration.override(config, given, "command line")
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise InputError(f"--set {word}: KEY=VALUE is wanted, such as hyp.lr0=0.02")
        config = configuration.override(config, {key: value}, "--set")
    return config
