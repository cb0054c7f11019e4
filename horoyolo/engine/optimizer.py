"""The optimizer of a model."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch
from torch import nn

from horoyolo.config import Optim
from horoyolo.model.yolo import YOLO

T = TypeVar("T", bound=torch.optim.Optimizer)


def _uncompiled(optimizer: type[T]) -> type[T]:
    """A torch optimizer without its hooks for torch's compiler.

    Nothing is compiled here, and at their first call the hooks import all of it: 1.3 s of a core and 70 MB for each worker that starts
    (torch 2.13).
    """
    hooked = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    plain = {name: inspect.unwrap(getattr(optimizer, name)) for name in hooked}
    return type(optimizer.__name__, (optimizer,), {**plain, "step": torch.no_grad()(inspect.unwrap(optimizer.step))})


SGD, Adam, AdamW = _uncompiled(torch.optim.SGD), _uncompiled(torch.optim.Adam), _uncompiled(torch.optim.AdamW)


def build_optimizer(model: YOLO, optim: Optim, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over three kinds of parameters, of the backbone and of the head: weights, which decay; scales of normalisation layers and
    biases, which do not. Frozen ones are in no group.
    """
    groups: dict[tuple[str, str], list[nn.Parameter]] = {(part, kind): [] for part in ("backbone", "head") for kind in ("weight", "norm", "bias")}
    for number, layer in enumerate(model.model):
        part = "backbone" if number < model.num_backbone else "head"
        for name, param in layer.named_parameters():
            if param.requires_grad:
                groups[part, "bias" if name.endswith("bias") else "norm" if param.ndim == 1 else "weight"].append(param)
    decays = {"weight": weight_decay, "norm": 0.0, "bias": 0.0}
    options = [{"params": params, "part": part, "kind": kind, "weight_decay": decays[kind]} for (part, kind), params in groups.items() if params]
    # One fused pass over parameter, gradient and momentum: on a CPU several times the speed of the plain loop.
    if optim.optimizer != "sgd":
        return {"adam": Adam, "adamw": AdamW}[optim.optimizer](options, lr=lr, betas=(momentum, 0.999), fused=True)
    return SGD(options, lr=lr, momentum=momentum, nesterov=True, fused=True)
