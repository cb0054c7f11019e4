"""Convolutions in bf16 by float32 instructions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from horoyolo.engine import device
from horoyolo.engine.bf16 import rounded_convolutions

SHAPE = (2, 8, 9, 7)


def convolution(**words: int | bool) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, 3, **words).to(memory_format=torch.channels_last)


def exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of operands rounded to bf16, in double precision."""
    weight, bias = (None if param is None else param.bfloat16().double() for param in (conv.weight, conv.bias))
    return nn.functional.conv2d(x.bfloat16().double(), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("words", [{}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 2, "dilation": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_is_the_exact_one_rounded(words: dict[str, int | bool], dtype: torch.dtype) -> None:
    conv, x = convolution(**words), torch.randn(SHAPE).to(dtype).to(memory_format=torch.channels_last)
    with rounded_convolutions():
        y = conv(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Where the exact sum lies near the middle between two values of bf16, the order of additions may decide.
    assert (y == exact(conv, x).bfloat16()).float().mean() > 0.995
    torch.testing.assert_close(y.double(), exact(conv, x), rtol=2**-8, atol=1e-6)


def test_gradients_are_rounded_once() -> None:
    conv, x, dy = convolution(padding=1), torch.randn(SHAPE, requires_grad=True), torch.randn(2, 16, 9, 7).bfloat16()
    with rounded_convolutions():
        y = conv(x)
    y.backward(dy)
    got = [x.grad, conv.weight.grad, conv.bias.grad]
    wanted = torch.autograd.grad(exact(conv, x), [x, conv.weight, conv.bias], dy.double())
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours is not None
        assert ours.dtype == torch.float32
        assert torch.equal(ours, ours.bfloat16().float())
        torch.testing.assert_close(ours, theirs.float(), rtol=2**-7, atol=1e-5)


def test_other_operations_are_as_in_any_bf16_pass() -> None:
    x = torch.randn(4, 4)
    with rounded_convolutions():
        rounded = x @ x
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded, x @ x)
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(("lacks", "taken"), [(True, 1), (False, 0)])
def test_only_a_cpu_without_bf16_rounds(monkeypatch: pytest.MonkeyPatch, lacks: bool, taken: int) -> None:
    contexts = []
    monkeypatch.setattr(device, "lacks_bf16", lambda: lacks)
    monkeypatch.setattr(device, "rounded_convolutions", lambda: contexts.append(1))
    for precision in ("bf16", "fp32"):
        device.numerics_for(torch.device("cpu"), precision).autocast()
    assert len(contexts) == taken
