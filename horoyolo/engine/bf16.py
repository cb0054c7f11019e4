"""Convolutions in bf16 on CPUs that have no instructions for them.

PyTorch then falls back to loops that take fifteen times as long as float32 ones. Here float32 instructions compute what those for bf16 would:
operands are rounded to bf16, so that products are exact, these are added in float32, and the result is rounded; the same of gradients, by
autograd. Other CPUs, and GPUs, differ only by the order in which they add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _RoundedConvolutions(TorchFunctionMode):
    """While it is active, ``torch.conv2d`` rounds what it takes and gives."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not torch.conv2d:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            named = {name: _rounded(value) for name, value in (kwargs or {}).items()}
            return torch.conv2d(*map(_rounded, args), **named).bfloat16()


def _rounded(value: Any) -> Any:
    """The values of a tensor rounded to bf16, as float32; anything else as it is."""
    return value.bfloat16().float() if isinstance(value, torch.Tensor) else value


@contextmanager
def rounded_convolutions() -> Iterator[None]:
    """The context of a forward pass in bf16 on such a CPU."""
    with torch.autocast("cpu", torch.bfloat16), _RoundedConvolutions():
        yield


def lacks_bf16() -> bool:
    """Whether this machine's CPU is such a one."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
