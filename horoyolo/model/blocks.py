"""The building blocks of the layer tables.

Attribute names follow the public YOLOv5 checkpoints, so that their tensors map by name. A block's arguments after the input channels
stand in the order of the tables' last column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BN_EPS = 1e-3
BN_MOMENTUM = 0.03


def same_padding(kernel: int, dilation: int = 1) -> int:
    """Padding that keeps the size at stride 1."""
    return dilation * (kernel - 1) // 2


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = same_padding(kernel, dilation) if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act: nn.Module = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class DWConv(Conv):
    """Depth-wise convolution, with as many groups as both channel counts allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1, act: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=math.gcd(in_channels, out_channels), dilation=dilation, act=act)


class Bottleneck(nn.Module):
    """1x1 then 3x3 convolution, with a residual connection where the channels allow it."""

    def __init__(self, in_channels: int, out_channels: int, shortcut: bool = True, groups: int = 1, expansion: float = 0.5) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(hidden, out_channels, 3, groups=groups)
        self.add = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class BottleneckCSP(nn.Module):
    """Cross-stage partial bottleneck (Wang et al. 2019, CSPNet), used by the tables before C3."""

    def __init__(self, in_channels: int, out_channels: int, repeats: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, out_channels)
        self.bn = nn.BatchNorm2d(2 * hidden, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act: nn.Module = nn.SiLU()
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, expansion=1.0) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.cv3(self.m(self.cv1(x)))
        return self.cv4(self.act(self.bn(torch.cat((deep, self.cv2(x)), 1))))


class C3(nn.Module):
    """CSP bottleneck with three convolutions: one half of the channels goes through the bottlenecks, the other past them."""

    def __init__(self, in_channels: int, out_channels: int, repeats: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(in_channels, hidden)
        self.cv3 = Conv(2 * hidden, out_channels)
        self.m: nn.Module = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, expansion=1.0) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class TransformerLayer(nn.Module):
    """Self-attention and a linear pair, both residual, without layer norms (Dosovitskiy et al. 2020, as YOLOv5 trims it)."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.ma = nn.MultiheadAttention(channels, num_heads)
        self.fc1 = nn.Linear(channels, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0]
        return x + self.fc2(self.fc1(x))


class TransformerBlock(nn.Module):
    """Transformer layers over the cells of a feature map, with a learned position embedding."""

    def __init__(self, channels: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.tr = nn.Sequential(*(TransformerLayer(channels, num_heads) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).permute(2, 0, 1)  # (H*W, B, C)
        return self.tr(cells + self.linear(cells)).permute(1, 2, 0).reshape(x.shape)


class C3TR(C3):
    """C3 with a transformer in place of the bottlenecks."""

    def __init__(self, in_channels: int, out_channels: int, repeats: int = 1, shortcut: bool = True) -> None:
        super().__init__(in_channels, out_channels, 0, shortcut)
        self.m = TransformerBlock(out_channels // 2, 4, repeats)


class GhostConv(nn.Module):
    """Half of the channels by a convolution, the other half from these by a cheap depth-wise one (Han et al. 2020, GhostNet)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.cv1 = Conv(in_channels, hidden, kernel, stride, groups=groups, act=act)
        self.cv2 = Conv(hidden, hidden, 5, groups=hidden, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(nn.Module):
    """GhostNet's bottleneck, of stride 1 or 2."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        hidden = out_channels // 2
        down = stride == 2
        self.conv = nn.Sequential(
            GhostConv(in_channels, hidden),
            DWConv(hidden, hidden, kernel, stride, act=False) if down else nn.Identity(),
            GhostConv(hidden, out_channels, act=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if down:
            self.shortcut = nn.Sequential(
                DWConv(in_channels, in_channels, kernel, stride, act=False), Conv(in_channels, out_channels, act=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class C3Ghost(C3):
    """C3 with ghost bottlenecks."""

    def __init__(self, in_channels: int, out_channels: int, repeats: int = 1, shortcut: bool = True) -> None:
        super().__init__(in_channels, out_channels, 0, shortcut)
        hidden = out_channels // 2
        self.m = nn.Sequential(*(GhostBottleneck(hidden, hidden) for _ in range(repeats)))


class SPP(nn.Module):
    """Spatial pyramid pooling: max pools of several sizes side by side (He et al. 2014)."""

    def __init__(self, in_channels: int, out_channels: int, kernels: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(hidden * (len(kernels) + 1), out_channels)
        self.m = nn.ModuleList(nn.MaxPool2d(kernel, 1, same_padding(kernel)) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat((x, *(pool(x) for pool in self.m)), 1))


class SPPF(nn.Module):
    """SPP with kernels k, 2k-1, 3k-2 by one pool of size k applied three times: the same result in less time."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 5) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(hidden * 4, out_channels)
        self.m = nn.MaxPool2d(kernel, 1, same_padding(kernel))

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.cv1(x)]
        for _ in range(3):
            levels.append(self.m(levels[-1]))
        return self.cv2(torch.cat(levels, 1))


class Focus(nn.Module):
    """Every 2x2 patch of pixels becomes four times the channels, then a convolution: the stem before version 6."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv(4 * in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[..., ::2, :], x[..., 1::2, :]
        return self.conv(torch.cat((even[..., ::2], odd[..., ::2], even[..., 1::2], odd[..., 1::2]), 1))


class Concat(nn.Module):
    """Joins feature maps along a dimension."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, self.dim)


class Detect(nn.Module):
    """The detection heads: one 1x1 convolution a layer.

    ``anchors`` (num_layers, num_anchors, 2) holds widths and heights in cells of the layer's own grid, as the public checkpoints do.
    """

    anchors: Tensor

    def __init__(self, in_channels: Sequence[int], num_classes: int, num_anchors: int) -> None:
        super().__init__()
        self.num_outputs = 5 + num_classes
        self.num_anchors = num_anchors
        self.m = nn.ModuleList(nn.Conv2d(channels, num_anchors * self.num_outputs, 1) for channels in in_channels)
        self.register_buffer("anchors", torch.zeros(len(in_channels), num_anchors, 2))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Feature maps to raw logits, one tensor (B, num_anchors, H, W, 5 + num_classes) a layer."""
        heads = []
        for conv, x in zip(self.m, xs, strict=True):
            y = conv(x)  # (B, num_anchors * outputs, H, W)
            heads.append(y.unflatten(1, (self.num_anchors, self.num_outputs)).permute(0, 1, 3, 4, 2))
        return heads


# What a layer table may name.
BLOCKS: dict[str, type[nn.Module]] = {
    "Conv": Conv,
    "DWConv": DWConv,
    "GhostConv": GhostConv,
    "Bottleneck": Bottleneck,
    "GhostBottleneck": GhostBottleneck,
    "BottleneckCSP": BottleneckCSP,
    "C3": C3,
    "C3TR": C3TR,
    "C3Ghost": C3Ghost,
    "SPP": SPP,
    "SPPF": SPPF,
    "Focus": Focus,
    "Concat": Concat,
    "Detect": Detect,
    "nn.Upsample": nn.Upsample,
    "nn.MaxPool2d": nn.MaxPool2d,
    "nn.ZeroPad2d": nn.ZeroPad2d,
}

# Activations that a table's `activation` may name.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "ELU": nn.ELU,
    "GELU": nn.GELU,
    "Hardswish": nn.Hardswish,
    "Mish": nn.Mish,
    "Identity": nn.Identity,
}
