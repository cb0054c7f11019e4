"""A layer table becomes a detector: backbone, neck and heads.

A table is a YOLOv5 model yaml (keys nc, depth_multiple, width_multiple, anchors, backbone, head), read without evaluating any of its text.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from horoyolo.config import InputError, read_yaml
from horoyolo.model.blocks import ACTIVATIONS, BLOCKS, C3, BottleneckCSP, Concat, Conv, Detect

SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}  # depth, width
MODELS = tuple(f"yolov5{size}{suffix}" for suffix in ("", "6") for size in SIZES)
IMAGE_CHANNELS = 3

# What a configuration calls an activation, and what a table does; 0.1 is the slope of YOLO's leaky units (Redmon & Farhadi 2018, YOLOv3).
ACTIVATION_NAMES = {"silu": "nn.SiLU()", "relu": "nn.ReLU()", "leakyrelu": "nn.LeakyReLU(0.1)", "hardswish": "nn.Hardswish()"}

_WORDS: dict[str, Any] = {"None": None, "True": True, "False": False}
_UNSCALED = (nn.Upsample, nn.MaxPool2d, nn.ZeroPad2d)  # blocks that keep the number of channels and take the table's arguments as they are
_TAKE_WORDS = ("nn.Upsample", "Detect")  # "nearest"; nc and anchors


class YOLO(nn.Module):
    """A YOLOv5 detector: images (B, 3, H, W) in 0..1, sides divisible by the largest stride, to raw heads.

    ``strides`` are the heads' cell sizes in pixels, ``names`` maps class numbers to names, ``table`` is the layer table it was built from
    (with its number of classes). Where its ``anchors`` are a number, as many a layer, they mean nothing before they are set.
    """

    def __init__(self, table: Mapping[str, Any], names: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.table = copy.deepcopy(dict(table))
        self.num_classes = int(table["nc"])
        self.names = dict(names or {i: str(i) for i in range(self.num_classes)})
        self.frozen: tuple[int, ...] = ()
        self.num_backbone = len(table["backbone"])  # layers before the head
        layers, self.sources = _build_layers(self.table)
        self.model = nn.Sequential(*layers)
        self._kept = {source for sources in self.sources for source in sources}
        _set_activation(self, table.get("activation"))
        self.strides = self._measure_strides()
        with torch.no_grad():
            self.detect.anchors.copy_(_anchors_in_cells(self.table["anchors"], self.strides))
        self._init_biases()

    @property
    def detect(self) -> Detect:
        layer = self.model[-1]
        assert isinstance(layer, Detect)
        return layer

    @property
    def anchors(self) -> Tensor:
        """Widths and heights (num_layers, num_anchors, 2) in cells of each layer's grid; times the stride: pixels."""
        return self.detect.anchors

    @property
    def anchors_px(self) -> Tensor:
        """The same in pixels."""
        return self.anchors * self.anchors.new_tensor(self.strides)[:, None, None]

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Takes other anchors (num_layers * num_anchors, 2) in pixels, the small ones for the layers of small strides."""
        by_area = anchors_px[anchors_px.prod(1).argsort(stable=True)].view_as(self.anchors).to(self.anchors)
        with torch.no_grad():
            for rank, layer in enumerate(sorted(range(len(self.strides)), key=self.strides.__getitem__)):
                self.anchors[layer].copy_(by_area[rank] / self.strides[layer])

    def freeze(self, layers: Iterable[int]) -> None:
        """Layers (their numbers in the table) that stay as they are: no gradients, BatchNorm by its running statistics in training too.

        Raises InputError for a number beyond the table, and where no layer is left to learn.
        """
        self.frozen = tuple(layers)
        last = len(self.model) - 1
        if any(number > last for number in self.frozen):
            raise InputError(f"freeze: layer {max(self.frozen)} is beyond those of the model, 0 to {last}")
        for number in self.frozen:
            self.model[number].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise InputError(f"freeze: all {last + 1} layers of the model; at least one must be left to learn")
        self.train(self.training)

    def learning_layers(self) -> nn.ModuleList:
        """The layers that are not frozen."""
        return nn.ModuleList(layer for number, layer in enumerate(self.model) if number not in self.frozen)

    def train(self, mode: bool = True) -> YOLO:
        """As of any module, but for frozen layers, which stay in eval mode."""
        super().train(mode)
        for number in self.frozen:
            self.model[number].eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raw logits, one tensor (B, num_anchors, H, W, 5 + num_classes) a layer: x, y, w, h, objectness, classes."""
        outputs: dict[int, Any] = {-1: images}
        out: Any = images
        for index, (layer, sources) in enumerate(zip(self.model, self.sources, strict=True)):
            inputs = [outputs[source] for source in sources]
            out = layer(inputs) if isinstance(layer, Concat | Detect) else layer(inputs[0])
            if index in self._kept:
                outputs[index] = out
        return out

    def decode(self, heads: list[Tensor]) -> Tensor:
        """Heads to predictions (B, N, 5 + num_classes), float32: x, y, w, h in pixels of the input, objectness and class scores in 0..1.

        A centre reaches half a cell beyond its own cell, a side up to four times its anchor (YOLOv5; cf. Redmon & Farhadi 2018, YOLOv3,
        section 2.1).
        """
        predictions = []
        for head, anchors, stride in zip(heads, self.anchors, self.strides, strict=True):
            _, _, height, width, outputs = head.shape
            scores = head.float().sigmoid()
            xy_cells = scores[..., 0:2] * 2 - 0.5 + grid_xy(height, width, head.device)
            wh_cells = (scores[..., 2:4] * 2) ** 2 * anchors[:, None, None].float()
            decoded = torch.cat((xy_cells * stride, wh_cells * stride, scores[..., 4:]), -1)
            predictions.append(decoded.reshape(head.shape[0], head.shape[1] * height * width, outputs))
        return torch.cat(predictions, 1)

    def _measure_strides(self) -> tuple[int, ...]:
        # By a real image, a small one: on the meta device torch would import its compiler for it, which takes longer than all else here.
        side = 128
        training = self.training
        try:
            with torch.no_grad():
                heads = self.eval()(torch.zeros(1, IMAGE_CHANNELS, side, side))
        except RuntimeError as error:
            raise InputError(f"model table: the shapes of its layers do not fit together ({_one_line(error)})") from error
        self.train(training)
        return tuple(side // head.shape[2] for head in heads)

    def _init_biases(self) -> None:
        # Scores start near the rate of objects, about 8 in a 640 px image, and equal for all classes: else the empty cells, nearly all
        # of them, would rule the first steps (Lin et al. 2017, Focal Loss, section 3.3).
        with torch.no_grad():
            for conv, stride in zip(self.detect.m, self.strides, strict=True):
                bias = conv.get_parameter("bias").view(self.detect.num_anchors, -1)  # (num_anchors, 5 + num_classes)
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)
                bias[:, 5:] += math.log(0.6 / (self.num_classes - 0.99999))


def build_model(cfg: str, num_classes: int | None = None, names: Mapping[int, str] | None = None) -> YOLO:
    """A freshly initialised model, by name (``yolov5n`` .. ``yolov5x6``) or by the path of a model yaml.

    ``num_classes`` replaces the table's own. Raises InputError for an unknown name or a table that cannot be built.
    """
    return model_from_table(load_layer_table(cfg), num_classes, names)


def model_from_table(table: Mapping[str, Any], num_classes: int | None = None, names: Mapping[int, str] | None = None) -> YOLO:
    """A freshly initialised model from a layer table as `load_layer_table` gives it (InputError: it is none of an anchor-based YOLOv5 model)."""
    missing = missing_parts(table)
    if missing:
        raise InputError(f"model table: it lacks {missing}, which YOLOv5's have (later models of its makers, such as yolov5su, do not)")
    nc = table.get("nc") if num_classes is None else num_classes
    if not isinstance(nc, int) or nc < 1:
        raise InputError(f"model table: nc is {nc!r}, a number of classes from 1 up is needed")
    return YOLO({**table, "nc": nc}, names)


def load_layer_table(cfg: str) -> dict[str, Any]:
    """The layer table of a model name, with or without ``.yaml``, or of a YOLOv5 model yaml; a file that exists goes before a name."""
    path = Path(cfg)
    if path.is_file():
        return _read_table(path)
    match = re.fullmatch(r"yolov5([nsmlx])(6?)", path.name.removesuffix(".yaml").removesuffix(".yml"))
    if match is None:
        near = difflib.get_close_matches(path.stem, MODELS, 1)
        hint = f"nearest is {near[0]}; " if near else ""
        raise InputError(f"model {cfg!r}: no such file and no known name ({hint}known are {', '.join(MODELS)})")
    table = _read_table(Path(__file__).parent / ("yolov5-p6.yaml" if match[2] else "yolov5.yaml"))
    table["depth_multiple"], table["width_multiple"] = SIZES[match[1]]
    return table


def fuse_conv_bn(model: YOLO) -> YOLO:
    """A copy for inference, in eval mode, with every BatchNorm that follows a convolution folded into it."""
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return fused.requires_grad_(False)


def grid_xy(height: int, width: int, device: torch.device) -> Tensor:
    """The cells' upper left corners (height, width, 2) as x, y."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack((x, y), -1).float()


def _read_table(path: Path) -> dict[str, Any]:
    table = read_yaml(path, "a YOLOv5 model yaml")
    missing = missing_parts(table)
    if missing:
        raise InputError(f"{path}: not a model yaml, it lacks {missing}")
    return table


def missing_parts(table: Mapping[str, Any]) -> str:
    """What a layer table lacks, as words for a line; empty when nothing."""
    parts = [key for key in ("backbone", "head") if not isinstance(table.get(key), list) or not table[key]]
    return ", ".join((["anchors"] if table.get("anchors") in (None, "", []) else []) + parts)


def _build_layers(table: dict[str, Any]) -> tuple[list[nn.Module], list[list[int]]]:
    """The table's layers, and for each the layers it reads from (-1: the image)."""
    num_anchors = _anchors_per_layer(table["anchors"])
    layers: list[nn.Module] = []
    sources: list[list[int]] = []
    channels = {-1: IMAGE_CHANNELS}
    for index, row in enumerate([*table["backbone"], *table["head"]]):
        where = f"model table, layer {index}"
        if not isinstance(row, list) or len(row) != 4:
            raise InputError(f"{where}: {row!r} is not [from, repeats, block, arguments]")
        origin, repeats, name, args = row
        if not isinstance(name, str) or name not in BLOCKS:
            raise InputError(f"{where}: unknown block {name!r}, known are {', '.join(BLOCKS)}")
        try:
            inputs = [index + number if number < 0 else number for number in (origin if isinstance(origin, list) else [origin])]
            repeats = max(round(repeats * table.get("depth_multiple", 1.0)), 1) if repeats > 1 else 1
            args = [_WORDS.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
            word = next((arg for arg in args if isinstance(arg, str)), None)
            if word is not None and name not in _TAKE_WORDS:
                raise ValueError(f"it takes no {word!r}; `activation:` in the table is for all layers")
            layer, channels[index] = _build_layer(BLOCKS[name], [channels[i] for i in inputs], repeats, args, table, num_anchors)
        except KeyError as error:
            raise InputError(f"{where}: from {origin!r} does not name an earlier layer") from error
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"{where}: {name} cannot be built from {args!r} ({_one_line(error)})") from error
        layers.append(layer)
        sources.append(inputs)
    if not layers or not isinstance(layers[-1], Detect):
        raise InputError("model table: the last layer must be Detect")
    rows = table["anchors"]
    if isinstance(rows, list) and len(rows) != len(sources[-1]):
        raise InputError(f"model table: {len(rows)} rows of anchors for the {len(sources[-1])} layers of Detect, they must be as many")
    return layers, sources


def _build_layer(
    block: type[nn.Module], inputs: list[int], repeats: int, args: list[Any], table: dict[str, Any], num_anchors: int
) -> tuple[nn.Module, int]:
    """One layer and its number of output channels."""
    if block is Detect:
        return Detect(inputs, table["nc"], num_anchors), 0
    if block is Concat:
        return Concat(*args), sum(inputs)
    if len(inputs) != 1:
        raise ValueError(f"it reads one layer, not {len(inputs)}")
    if block in _UNSCALED:
        return block(*args), inputs[0]
    out_channels = math.ceil(args[0] * table.get("width_multiple", 1.0) / 8) * 8
    if issubclass(block, C3 | BottleneckCSP):
        return block(inputs[0], out_channels, repeats, *args[1:]), out_channels
    copies = [block(inputs[0], out_channels, *args[1:]) for _ in range(repeats)]
    return copies[0] if repeats == 1 else nn.Sequential(*copies), out_channels


def _anchors_per_layer(anchors: Any) -> int:
    """How many anchors a layer has: a table may give their sizes, or only this number, where they are to be fitted to the data."""
    if type(anchors) is int and anchors > 0:
        return anchors
    rows = anchors if isinstance(anchors, list) else []
    fits = all(isinstance(row, list) and row and len(row) % 2 == 0 and len(row) == len(rows[0]) for row in rows)
    if not rows or not fits or any(type(side) not in (int, float) for row in rows for side in row):
        raise InputError(
            f"model table: anchors are {anchors!r}, needed are lists of width, height, width, height ... in pixels, one a layer, "
            "or the number of anchors that each layer is to have"
        )
    return len(rows[0]) // 2


def _anchors_in_cells(anchors: list[list[float]] | int, strides: tuple[int, ...]) -> Tensor:
    if isinstance(anchors, int):
        return torch.ones(len(strides), anchors, 2)  # until they are fitted
    # Some tables list the anchors from the largest layer down while the strides go up.
    descending = sum(anchors[-1]) < sum(anchors[0])
    if descending != (strides[-1] < strides[0]):
        anchors = anchors[::-1]
    pixels = torch.tensor(anchors, dtype=torch.float32).view(len(anchors), -1, 2)
    return pixels / torch.tensor(strides).view(-1, 1, 1)


def _set_activation(model: nn.Module, text: str | None) -> None:
    """Replaces the convolutions' SiLU by what a table's ``activation`` says, such as ``nn.LeakyReLU(0.1)``."""
    if text is None:
        return
    match = re.fullmatch(r"(?:torch\.)?nn\.(\w+)\((\d*\.?\d+)?(?:,?\s*inplace=(?:True|False))?\)", str(text).strip())
    if match is None or match[1] not in ACTIVATIONS:
        raise InputError(f"model table: unknown activation {text!r}, known are {', '.join(f'nn.{name}()' for name in ACTIVATIONS)}")
    arguments = [float(match[2])] if match[2] else []
    for module in model.modules():
        if isinstance(module, Conv) and isinstance(module.act, nn.SiLU):
            module.act = ACTIVATIONS[match[1]](*arguments)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
