"""Exact gradients in one process; whole runs at several sizes are in tests/engine/test_train.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from horoyolo.compression.dense import ExactSum
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.distributed.buckets import build_buckets
from horoyolo.distributed.comm import LocalComm
from horoyolo.distributed.exact import convert_exact
from horoyolo.distributed.exchange import Exchange
from horoyolo.distributed.syncbn import convert_sync_bn


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def build_model(*norms: nn.Module) -> nn.Sequential:
    """Kernels of 3 and 1 over few pixels: there torch picks other kernels, with other orders of sums, for other numbers of images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 256, 3, 2, 1, bias=False), *norms, nn.SiLU(), nn.Conv2d(256, 128, 1), nn.SiLU(), nn.Conv2d(128, 24, 1)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def images(count: int, side: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 16, side, side).to(memory_format=torch.channels_last)


def gradients(model: nn.Module, exchange: Exchange, batches: list[Tensor]) -> list[Tensor]:
    exchange.zero_grad()
    for number, batch in enumerate(batches, start=1):
        if number == len(batches):
            exchange.arm()
        if len(batch):
            model(batch).square().sum().backward()
    exchange.finish()
    return [param.grad.clone() for param in model.parameters()]


def test_gradients_are_those_of_plain_convolutions(num_threads: int) -> None:
    plain = build_model(nn.BatchNorm2d(256))
    exact = convert_sync_bn(copy.deepcopy(plain), LocalComm())
    wide_grads = convert_exact(exact)
    batch = images(5, side=7)
    output = exact(batch)
    assert_close(output, plain(batch), rtol=1e-5, atol=1e-5)
    assert output.is_contiguous(memory_format=torch.channels_last)
    plain(batch).square().sum().backward()
    exchange = Exchange(exact.named_parameters(), ErrorFeedback(ExactSum(wide_grads)), LocalComm(), 25.0)
    for param, grad in zip(plain.parameters(), gradients(exact, exchange, [batch]), strict=True):
        assert_close(grad, param.grad, rtol=1e-4, atol=1e-4 * float(param.grad.abs().max()))


@pytest.mark.parametrize("shares", [[8, 8], [4, 4, 4, 4], [3, 13], [1, 0, 2, 13], [1] * 16])
def test_shares_and_threads_change_no_bit(shares: list[int]) -> None:
    found = []
    for threads, parts in ((1, [16]), (1, shares), (2, shares)):
        torch.set_num_threads(threads)
        model = build_model()
        wide_grads = convert_exact(model)
        exchange = Exchange(model.named_parameters(), ErrorFeedback(ExactSum(wide_grads)), LocalComm(), 25.0)
        found.append(gradients(model, exchange, list(images(16).split(parts))))
    torch.set_num_threads(1)
    for grads in found[1:]:
        assert all(torch.equal(grad, expected) for grad, expected in zip(grads, found[0], strict=True))


def test_plain_convolutions_do_differ() -> None:
    """Without which the test above would say nothing."""
    model = build_model()
    whole, shared = model(images(16)), torch.cat([model(part) for part in images(16).split([3, 13])])
    grads = []
    for output in (whole, shared):
        model.zero_grad()
        output.square().sum().backward()
        grads.append([param.grad.clone() for param in model.parameters()])
    assert not all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def test_evaluation_does_not_depend_on_how_images_are_cut_into_batches() -> None:
    """What is drawn next may depend on scores."""
    model = build_model()
    plain = copy.deepcopy(model).eval()
    convert_exact(model)
    with torch.inference_mode():
        whole = model.eval()(images(16))
        assert torch.equal(whole, torch.cat([model(part) for part in images(16).split([3, 13])]))
        assert_close(whole, plain(images(16)))


def test_frozen_layers_are_left_alone() -> None:
    model = build_model()
    model[0].weight.requires_grad_(False)
    wide_grads = convert_exact(model)
    model.train()(images(3)).sum().backward()
    assert not wide_grads.of(model[0].weight).any()
    assert wide_grads.of(model[2].weight).any()
    ErrorFeedback(ExactSum(wide_grads)).start(build_buckets(model.named_parameters(), 25.0)[0], LocalComm()).finish()
    assert not wide_grads.of(model[2].weight).any()  # used


def test_what_a_lossy_way_to_sum_has_left_out_is_sent() -> None:
    """A run that is resumed without compression."""
    model = build_model()
    wide_grads = convert_exact(model)
    compressor = ErrorFeedback(ExactSum(wide_grads))
    exchange = Exchange(model.named_parameters(), compressor, LocalComm(), 25.0)
    plain = gradients(model, exchange, [images(3)])
    residuals = {name: torch.randn_like(param) for name, param in model.named_parameters()}
    compressor.load_rank_state_dict(residuals)
    for grad, expected, residual in zip(gradients(model, exchange, [images(3)]), plain, residuals.values(), strict=True):
        assert_close(grad, expected + residual)
    assert compressor.rank_state_dict() == {}
    assert all(torch.equal(grad, expected) for grad, expected in zip(gradients(model, exchange, [images(3)]), plain, strict=True))


def test_layers_in_eval_mode_are_exact_while_others_train() -> None:
    """Frozen layers: what comes of an image must not depend on its neighbours there either."""
    model = build_model()
    convert_exact(model)
    model.eval()
    assert torch.equal(model(images(16)), torch.cat([model(part) for part in images(16).split([3, 13])]))


def test_other_layers_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"2\.weight, 2\.bias.*only convolutions"):
        convert_exact(model)
    model(torch.ones(1, 3, 2, 2)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())  # nothing was converted
