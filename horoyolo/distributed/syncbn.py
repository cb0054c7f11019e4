"""BatchNorm over the whole global batch, whatever the shares of the workers, down to none."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horoyolo.distributed.comm import Comm


class WideGrads(Protocol):
    """Gradients as float64 sums."""

    def of(self, param: Tensor) -> Tensor: ...


class SyncBatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training are those of all workers' images together; the same parameters, buffers and
    ``state_dict``.

    Every worker must run forward and backward of every layer, also one without images: its input then has shape (0, C, H, W). One small
    allreduce each way (Ioffe & Szegedy 2015, Batch Normalization, algorithm 1 and section 3, with the sums taken over workers).
    """

    def __init__(self, num_features: int, comm: Comm, name: str, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)
        self._comm = comm
        self._name = name
        self.wide_grads: WideGrads | None = None  # where gradients go in float64, instead of to their parameters: see exact.py

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var, count = global_statistics(x, self._comm, f"{self._name}.forward")
        self._update_running_statistics(mean, var, count)
        mean, var = mean.to(self.weight.dtype), var.to(self.weight.dtype)
        return _Normalise.apply(x, self.weight, self.bias, mean, var, count, self)

    def sum_backward(self, sums: Tensor) -> Tensor:
        """Sums over workers for the backward pass."""
        return self._comm.allreduce(sums, name=f"{self._name}.backward")

    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: float) -> None:
        assert self.running_mean is not None  # all four: see _converted
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        unbiased_var = var * (count / max(count - 1.0, 1.0))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


def convert_sync_bn(model: nn.Module, comm: Comm) -> nn.Module:
    """Replace every ``nn.BatchNorm2d`` in ``model`` by a ``SyncBatchNorm`` with the same parameter and buffer tensors; gives the model
    back.

    Raises ValueError for layers that ``SyncBatchNorm`` has no counterpart for (no affine part, no running statistics, cumulative momentum).
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        for child_name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                path = f"{name}.{child_name}" if name else child_name
                setattr(module, child_name, _converted(child, comm, path))
    return model


@torch.no_grad()
def average_bn_buffers(model: nn.Module, comm: Comm) -> None:
    """Replace the running statistics of all BatchNorm layers by their mean over workers, in place, in one allreduce.

    Without ``SyncBatchNorm`` each worker's statistics are those of its own shares. Evaluation and checkpoints want one set: average a copy
    of the model, so that training goes on from the worker's own. A worker whose share of a batch is empty skips the forward pass, so that
    its statistics stay as they are.
    """
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if comm.size() == 1 or not buffers:
        return
    flat = comm.allreduce(torch.cat([buffer.float() for buffer in buffers]), name="bn_buffers") / comm.size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean)


@torch.no_grad()
def global_statistics(x: Tensor, comm: Comm, name: str) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all workers' ``x`` (B, C, H, W), both (C,) float64, and how many values a channel has.

    They hardly depend on how the images are shared out over workers. That matters: a fresh detector is so sensitive that fused kernels, which add up
    a channel of the whole share in one float32, change its first gradient by two per cent when the shares change.
    """
    num_channels = x.shape[1]
    pixels = x.shape[2] * x.shape[3]
    wide = _wide(x)
    # Each image is centred on its own mean first; the moments of all images are put together in float64, so that their difference does not cancel.
    image_mean = wide.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    image_square = (wide - image_mean).square_().sum((2, 3)).double()
    image_mean = image_mean.flatten(1).double()
    sums = torch.cat(
        [
            torch.tensor([len(x) * pixels], dtype=torch.float64, device=x.device),
            (image_mean * pixels).sum(0),
            (image_square + image_mean.square() * pixels).sum(0),
        ]
    )
    comm.allreduce(sums, name=name)
    count = float(sums[0])
    mean, square = (sums[1:] / max(count, 1.0)).split(num_channels)
    return mean, (square - mean.square()).clamp_(min=0.0), count


def _channel_sums(x: Tensor) -> Tensor:
    """Sums (C,) float64 of (B, C, H, W), each image's own first: these have the same bits wherever the image is."""
    return x.sum((2, 3)).double().sum(0)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """Normalises with statistics that depend on the input of all workers, and takes the gradient through them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: float, bn: SyncBatchNorm) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.bn = count, bn
        inv_std = (var + bn.eps).rsqrt()
        return _affine(x, weight * inv_std, bias - weight * mean * inv_std)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        dy = grads[0]
        inv_std = (var + ctx.bn.eps).rsqrt()
        dy_sum, dy_x_sum = _channel_sums(_wide(dy)), _channel_sums(_wide(dy) * _wide(x))
        own = torch.stack([(dy_x_sum - mean * dy_sum) * inv_std, dy_sum])  # of weight and bias: this worker's part, which the exchange sums

        # The statistics depend on x: dx = weight * inv_std * (dy - mean(dy) - x_hat * mean(dy * x_hat)), an affine function of dy and x.
        sums = ctx.bn.sum_backward(own.clone())
        mean_dy_x_hat, mean_dy = sums / max(ctx.count, 1.0)
        gain = weight * inv_std
        slope = -gain * inv_std * mean_dy_x_hat
        dx = _affine(dy, gain, -gain * mean_dy - slope * mean)
        dx += _affine(x, slope, torch.zeros_like(slope))
        if ctx.bn.wide_grads is not None:
            ctx.bn.wide_grads.of(ctx.bn.weight).add_(own[0])
            ctx.bn.wide_grads.of(ctx.bn.bias).add_(own[1])
            return dx, *[None] * 6
        return dx, own[0].to(weight.dtype), own[1].to(weight.dtype), *[None] * 4


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift for each channel, in one pass and in the dtype of x: batch_norm does that for any layout and mixed dtypes."""
    if not x.numel():
        return torch.empty_like(x)
    scale, shift = (factor.to(torch.promote_types(x.dtype, torch.float32)) for factor in (scale, shift))
    return F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, training=False, eps=0.0)


def _converted(bn: nn.BatchNorm2d, comm: Comm, name: str) -> SyncBatchNorm:
    if not bn.affine or not bn.track_running_stats or bn.momentum is None:
        raise ValueError(f"{name}: {bn} has no synchronised form here: it needs affine=True, track_running_stats=True and a momentum")
    sync = SyncBatchNorm(bn.num_features, comm, f"syncbn.{name}", bn.eps, bn.momentum)
    sync.weight, sync.bias = bn.weight, bn.bias
    sync.running_mean, sync.running_var, sync.num_batches_tracked = bn.running_mean, bn.running_var, bn.num_batches_tracked
    return sync.train(bn.training)
