from __future__ import annotations

import copy

import torch
from torch import nn

from horoyolo.model.ema import EMA


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def test_average_follows_the_ramped_decay() -> None:
    model = small_model()
    ema = EMA(model, decay=0.15)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for update in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model(torch.randn(4, 2, 3, 3))  # moves the running statistics
        ema.update(model)
        decay = min(0.15, (1 + update) / (20 + update))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
        for name, value in ema.model.state_dict().items():
            torch.testing.assert_close(value, expected[name])
    assert ema.updates == 5


def test_average_is_float32_and_apart_from_the_model() -> None:
    model = small_model().bfloat16()
    before = copy.deepcopy(model.state_dict())
    ema = EMA(model)
    ema.update(model)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_state_goes_on_where_it_was() -> None:
    model = small_model()
    first, second = EMA(model), EMA(small_model())
    with torch.no_grad():
        model[0].weight.add_(1)
    first.update(model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for ema in (first, second):
        ema.update(model)
    assert first.updates == second.updates == 2
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
