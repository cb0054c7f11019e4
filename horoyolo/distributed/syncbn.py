"""BatchNorm over the whole global batch, whatever the shares of the workers, down to none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horoyolo.distributed.comm import Comm


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

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var, count = global_statistics(x, self._comm, f"{self._name}.forward")
        self._update_running_statistics(mean, var, count)
        mean, var = mean.to(self.weight.dtype), var.to(self.weight.dtype)
        return _Normalise.apply(x, self.weight, self.bias, mean, var, count, self.eps, self._comm, f"{self._name}.backward")

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

    Each worker centres its own values first; only then are moments formed, in float64, so that their difference does not cancel.
    """
    num_channels = x.shape[1]
    count = x.numel() // num_channels
    sums = torch.zeros(2 * num_channels + 1, dtype=torch.float64, device=x.device)
    if count:
        # Wide buffers make the kernel accumulate and answer in float32 for bfloat16 input too; momentum 0 leaves them alone.
        unused = torch.zeros(2, num_channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        mean, var = (moment.double() for moment in torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0))
        sums[0] = count
        sums[1 : num_channels + 1] = mean * count
        sums[num_channels + 1 :] = (var + mean.square()) * count
    comm.allreduce(sums, name=name)
    global_count = float(sums[0])
    mean, square = (sums[1:] / max(global_count, 1.0)).split(num_channels)
    return mean, (square - mean.square()).clamp_(min=0.0), global_count


class _Normalise(torch.autograd.Function):
    """Normalises with statistics that depend on the input of all workers, and takes the gradient through them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: float, eps: float, comm: Comm, name: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps, ctx.comm, ctx.name = count, eps, comm, name
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps) if x.numel() else torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if x.numel():
            # One fused pass: dx with the statistics held constant, and this worker's sums of dy * x_hat and dy.
            dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)

        sums = ctx.comm.allreduce(torch.stack([dbias, dweight]).double(), name=ctx.name)
        if x.numel():
            # The statistics' own part: dx -= weight * inv_std * (mean(dy) + x_hat * mean(dy * x_hat)), an affine function of x for each
            # channel.
            inv_std = (var.double() + ctx.eps).rsqrt()
            mean_dy, mean_dy_x_hat = sums / ctx.count
            slope = -weight.double() * inv_std.square() * mean_dy_x_hat
            offset = -weight.double() * inv_std * mean_dy - slope * mean.double()
            dx += _affine(x, slope.to(weight.dtype), offset.to(weight.dtype))
        return dx, dweight, dbias, None, None, None, None, None, None


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift for each channel, in one pass and in the dtype of x: batch_norm does that for any layout and mixed dtypes."""
    return F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, training=False, eps=0.0)


def _converted(bn: nn.BatchNorm2d, comm: Comm, name: str) -> SyncBatchNorm:
    if not bn.affine or not bn.track_running_stats or bn.momentum is None:
        raise ValueError(f"{name}: {bn} has no synchronised form here: it needs affine=True, track_running_stats=True and a momentum")
    sync = SyncBatchNorm(bn.num_features, comm, f"syncbn.{name}", bn.eps, bn.momentum)
    sync.weight, sync.bias = bn.weight, bn.bias
    sync.running_mean, sync.running_var, sync.num_batches_tracked = bn.running_mean, bn.running_var, bn.num_batches_tracked
    return sync.train(bn.training)
