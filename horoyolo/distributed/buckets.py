"""Gradients live in a few large flat buffers, so that they can be sent without a copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Bucket:
    """A flat buffer and the parameters whose gradients lie in it one after the other."""

    name: str  # the same on every worker
    flat: Tensor  # (numel,) float32
    params: list[tuple[str, nn.Parameter]]
    grads: list[Tensor]  # a view into ``flat`` for each parameter, with the parameter's shape and strides


def build_buckets(named_parameters: Iterable[tuple[str, nn.Parameter]], bucket_mb: float) -> list[Bucket]:
    """Buckets of at most ``bucket_mb`` MB (10^6 bytes; a larger parameter has one of its own) for all parameters that need a gradient.

    They are filled in reverse order of registration, which is about the order in which backward produces gradients (Li et al. 2020, PyTorch
    Distributed, section 3.2.3), and depend on the list of parameters alone, so that the same run sums in the same order every time.

    In a bucket they lie in rising order of size, so that small ones are in one piece, which a compressor may treat otherwise.
    """
    groups: list[list[tuple[str, nn.Parameter]]] = []
    room = 0
    for name, param in reversed(list(named_parameters)):
        if not param.requires_grad:
            continue
        if not groups or param.numel() > room:
            groups.append([])
            room = int(bucket_mb * 1e6) // 4
        groups[-1].append((name, param))
        room -= param.numel()
    return [_build_bucket(f"bucket.{index}", sorted(group, key=lambda named: named[1].numel())) for index, group in enumerate(groups)]


def _build_bucket(name: str, params: list[tuple[str, nn.Parameter]]) -> Bucket:
    flat = torch.zeros(sum(param.numel() for _, param in params), device=params[0][1].device)
    grads = []
    offset = 0
    for _, param in params:
        # Laid out as the parameter's memory is: autograd's gradient is copied in and the optimizer reads it without reordering.
        grads.append(flat.as_strided(param.shape, param.stride(), offset))
        offset += param.numel()
    return Bucket(name, flat, params, grads)
