"""SyncBatchNorm with one worker; several workers are in test_distributed_workers.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from horoyolo.distributed.comm import LocalComm
from horoyolo.distributed.syncbn import SyncBatchNorm, average_bn_buffers, convert_sync_bn


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3, momentum=0.03), nn.Sequential(nn.SiLU(), nn.BatchNorm2d(5)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_worker_equals_batch_norm(memory_format):
    plain = build_model().to(memory_format=memory_format)
    sync = convert_sync_bn(copy.deepcopy(plain), LocalComm())
    images = (torch.randn(4, 3, 9, 7) + 20).to(memory_format=memory_format)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((plain, sync), inputs, strict=True)]
    target = torch.randn_like(outputs[0])
    for output in outputs:
        (output * target).sum().backward()
    assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-4)
    assert outputs[1].stride() == outputs[0].stride()
    assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
    for expected, param in zip(plain.parameters(), sync.parameters(), strict=True):
        assert_close(param.grad, expected.grad, rtol=1e-3, atol=1e-2)
    for expected, buffer in zip(plain.buffers(), sync.buffers(), strict=True):
        assert_close(buffer, expected, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_the_function():
    layer = SyncBatchNorm(2, LocalComm(), "bn").double()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight, bias: layer(x), (x, layer.weight, layer.bias))


def test_conversion_keeps_tensors_names_mode_and_settings():
    model = build_model()
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    convert_sync_bn(model.eval(), LocalComm())
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert isinstance(model[1], SyncBatchNorm)
    assert isinstance(model[2][1], SyncBatchNorm)
    assert (model[1].eps, model[1].momentum, model[1].training) == (1e-3, 0.03, False)
    images = torch.randn(2, 3, 5, 5)
    assert torch.equal(model(images), build_model().eval()(images))


def test_layers_without_a_synchronised_form_are_refused():
    with pytest.raises(ValueError, match=r"bn: .* needs affine=True"):
        convert_sync_bn(nn.ModuleDict({"bn": nn.BatchNorm2d(3, affine=False)}), LocalComm())


def test_statistics_survive_a_mean_far_from_zero():
    layer = SyncBatchNorm(1, LocalComm(), "bn")
    x = torch.randn(8, 1, 16, 16) * 0.1 + 1000
    layer(x)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * x.double().var().item(), rel=1e-4)


def test_one_worker_averages_nothing():
    model = build_model()
    model(torch.randn(2, 3, 5, 5))
    before = copy.deepcopy(model.state_dict())
    average_bn_buffers(model, LocalComm())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
