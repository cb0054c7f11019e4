"""Gradients with the same bits however the images are shared out over workers and threads.

Sums of float32 depend on their order, and a convolution's kernel, with it the order in which it adds, on how many images it is given. A fresh
detector is chaotic at YOLOv5's rates: one weight changed by its last bit changes losses by a per cent within thirty steps. So here every
image goes through each convolution by itself, on one thread, and the gradients of images are added in float64, up to the sum over workers.
That is exact, but for values more than 2^25 times smaller than their sum, and rounds to the same float32 in any order. Everything else that
training does is elementwise, or summed by ``syncbn.py`` in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horoyolo.distributed.syncbn import SyncBatchNorm


class WideGrads:
    """The gradients of an update so far as float64 sums, of parameters whose own ``grad`` autograd leaves empty."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> WideGrads:
        return self  # a copied model is no other's source of gradients

    def of(self, param: Tensor) -> Tensor:
        """The sum for a parameter so far, laid out as the parameter's memory is: to be added to, and to be set to zero when it was used."""
        if param not in self._sums:
            self._sums[param] = torch.zeros_like(param, dtype=torch.float64)
        return self._sums[param]

    def clear(self) -> None:
        """Forgets the sums so far."""
        self._sums.clear()


class ImageThreads:
    """Computes images at the same time, each on one thread: the order in which a kernel adds depends on its threads too."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) if num_threads > 1 else None

    def __deepcopy__(self, memo: dict) -> ImageThreads:
        return self

    def each(self, compute: Callable[..., Any], *batches: Tensor) -> Iterable[Any]:
        """``compute`` of each image (1, C, H, W) of ``batches``, in their order."""
        parts = [batch.split(1) if len(batch) else () for batch in batches]
        return self._pool.map(compute, *parts) if self._pool else map(compute, *parts)


class ExactConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose outcome for an image does not depend on its neighbours, and whose gradients go to ``wide_grads``."""

    wide_grads: WideGrads
    threads: ImageThreads

    def forward(self, x: Tensor) -> Tensor:
        return _Convolve.apply(x, self.weight, self.bias, self)


def convert_exact(model: nn.Module) -> WideGrads:
    """Turn the convolutions of ``model``, whose BatchNorm is synchronised already, into exact ones, in place; gives where gradients go.

    Raises ValueError for parameters of other layers, and then changes nothing.
    """
    layers = [module for module in model.modules() if type(module) in (nn.Conv2d, ExactConv2d) or isinstance(module, SyncBatchNorm)]
    known = {param for layer in layers for param in layer.parameters(recurse=False)}
    others = [name for name, param in model.named_parameters() if param not in known]
    if others:
        raise ValueError(f"no exact gradients for {', '.join(others)}: only convolutions and synchronised BatchNorm have them")
    wide_grads, threads = WideGrads(), ImageThreads(torch.get_num_threads())
    for layer in layers:
        if type(layer) is nn.Conv2d:
            layer.__class__ = ExactConv2d
        if isinstance(layer, ExactConv2d):
            layer.threads = threads
        if isinstance(layer, (ExactConv2d, SyncBatchNorm)):
            layer.wide_grads = wide_grads
    return wide_grads


class _Convolve(torch.autograd.Function):
    """A convolution image by image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ExactConv2d) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        if not len(x):
            return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

        def of_image(image: Tensor) -> Tensor:
            return F.conv2d(image, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

        return _stack(list(conv.threads.each(of_image, x)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        conv: ExactConv2d = ctx.conv
        wants_dx = ctx.needs_input_grad[0]

        def of_image(dy: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mask = [wants_dx, conv.weight.requires_grad, False]
            shape = (conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
            return torch.ops.aten.convolution_backward(dy, image, weight, None, *shape, mask)

        dxs = []
        for dx, dweight, _ in conv.threads.each(of_image, grads[0], x):
            dxs.append(dx)
            if dweight is not None:
                conv.wide_grads.of(conv.weight).add_(dweight)
        if conv.bias is not None and conv.bias.requires_grad:
            conv.wide_grads.of(conv.bias).add_(grads[0].sum((2, 3)).double().sum(0))
        dx = None if not wants_dx else _stack(dxs) if dxs else torch.zeros_like(x)
        return dx, None, None, None


def _stack(images: list[Tensor]) -> Tensor:
    """Images (1, C, H, W) as one batch in the layout that convolutions take: channels_last, told of tensors whose strides leave it open."""
    out = torch.empty((len(images), *images[0].shape[1:]), dtype=images[0].dtype, memory_format=torch.channels_last)
    for place, image in zip(out, images, strict=True):
        place.copy_(image[0])
    return out
