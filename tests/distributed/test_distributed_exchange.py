"""Buckets and the exchange with one worker; several workers are in test_distributed_workers.py."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from horoyolo.compression.dense import Dense
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.distributed.buckets import build_buckets
from horoyolo.distributed.comm import LocalComm
from horoyolo.distributed.exchange import Exchange, global_norm


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 1))


class RecordingCompressor(ErrorFeedback):
    """Plain sums, and a list of the buckets in the order they left."""

    def __init__(self, overlap: bool):
        super().__init__(Dense(), overlap)
        self.started = []
        self.told = []

    def start(self, bucket, comm):
        self.started.append(bucket.name)
        return super().start(bucket, comm)

    def measured(self, tail_s, backward_s, comm):
        self.told.append((tail_s, backward_s))


def backward(model: nn.Module) -> None:
    model(torch.ones(1, 3, 6, 6)).square().sum().backward()


def build_exchange(model: nn.Module, overlap: bool = True) -> Exchange:
    return Exchange(model.named_parameters(), RecordingCompressor(overlap), LocalComm(), bucket_mb=0.001)


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=4), max_size=12),
    frozen=st.sets(st.integers(0, 11)),
    bucket_mb=st.floats(1e-6, 1e-3),
)
def test_buckets_hold_each_trainable_parameter_once_in_reverse_order_and_within_their_size(shapes, frozen, bucket_mb):
    params = [(f"p{index}", nn.Parameter(torch.randn(shape), requires_grad=index not in frozen)) for index, shape in enumerate(shapes)]
    buckets = build_buckets(params, bucket_mb)
    wanted = [named for named in reversed(params) if named[1].requires_grad]
    for bucket in buckets:
        here, wanted = wanted[: len(bucket.params)], wanted[len(bucket.params) :]
        sizes = [param.numel() for _, param in bucket.params]
        assert sizes == sorted(sizes)
        assert {name for name, _ in bucket.params} == {name for name, _ in here}
    assert not wanted
    assert [bucket.name for bucket in buckets] == [f"bucket.{index}" for index in range(len(buckets))]
    for bucket in buckets:
        assert len(bucket.params) == 1 or bucket.flat.numel() * 4 <= bucket_mb * 1e6
        # Each number of the buffer belongs to one gradient: what is written through the gradients adds up to what is in the buffer.
        for (_, param), grad in zip(bucket.params, bucket.grads, strict=True):
            assert grad.shape == param.shape
            assert grad.stride() == param.stride()
            grad += 1
        assert (bucket.flat == 1).all()
        assert bucket.flat.numel() == sum(grad.numel() for grad in bucket.grads)


def test_gradients_of_a_channels_last_model_lie_as_its_parameters_do():
    model = build_model().to(memory_format=torch.channels_last)
    (bucket,) = build_buckets(model.named_parameters(), 1.0)
    strides = {name: grad.stride() for (name, _), grad in zip(bucket.params, bucket.grads, strict=True)}
    assert strides["0.weight"] == model[0].weight.stride() == (27, 1, 9, 3)


@pytest.mark.parametrize("overlap", [True, False])
def test_one_worker_gets_the_gradients_of_plain_autograd_and_sends_nothing(overlap):
    model = build_model()
    reference = copy.deepcopy(model)
    exchange = build_exchange(model, overlap)
    for _ in range(2):  # the second update starts from cleared gradients
        exchange.zero_grad()
        backward(model)
        exchange.arm()
        backward(model)
        stats = exchange.finish()
    backward(reference)
    backward(reference)
    for param, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(param.grad, expected.grad)
    assert stats.wire_bytes == 0
    assert stats.wait_s >= 0


def test_buckets_leave_while_backward_runs_only_when_armed_and_overlapped():
    for overlap, left_in_backward in ((True, True), (False, False)):
        model = build_model()
        exchange = build_exchange(model, overlap)
        names = [bucket.name for bucket in exchange.buckets]
        assert len(names) > 2
        backward(model)
        assert exchange._compressor.started == []
        exchange.arm()
        backward(model)
        assert sorted(exchange._compressor.started) == (names if left_in_backward else [])
        exchange.finish()
        assert sorted(exchange._compressor.started) == names  # each once


@pytest.mark.parametrize("overlap", [True, False])
def test_the_compressor_is_told_of_backward_without_what_is_waited_for_after_it(overlap):
    model = build_model()
    model[2].register_full_backward_pre_hook(lambda *_: time.sleep(0.05))
    exchange = build_exchange(model, overlap)
    for has_images in (True, False):
        exchange.zero_grad()
        exchange.arm()
        if has_images:
            backward(model)
        time.sleep(0.2)  # for the losses of others, say
        exchange.finish()
        exchange.measure()
    (tail_s, backward_s), (_, without_images_s) = exchange._compressor.told
    assert 0.05 <= backward_s < 0.2
    assert tail_s >= backward_s + 0.2
    assert without_images_s == 0


def test_the_compressor_is_not_told_of_updates_unlike_others():
    model = build_model()
    exchange = build_exchange(model)
    for comparable in (True, False):
        exchange.arm()
        backward(model)
        exchange.finish()
        exchange.measure(comparable)
        exchange.measure()  # of this update there is nothing more to tell
        exchange.zero_grad()
    assert len(exchange._compressor.told) == 1


@pytest.mark.parametrize("alone", [True, False])
def test_the_exchange_gives_way_only_where_no_other_collectives_run_beside_computing(alone):
    class Noting(LocalComm):
        gave_way = False

        def give_way(self, wanted, for_good):
            self.gave_way = wanted

    model, comm = build_model(), Noting()
    Exchange(model.named_parameters(), RecordingCompressor(overlap=False), comm, bucket_mb=0.001, alone=alone).arm()
    assert comm.gave_way == alone


def test_a_worker_without_images_takes_part_with_zeros():
    exchange = build_exchange(build_model())
    exchange.arm()
    exchange.finish()
    assert exchange._compressor.started == [bucket.name for bucket in exchange.buckets]
    assert all((bucket.flat == 0).all() for bucket in exchange.buckets)


def test_misuse_is_named():
    model = build_model()
    exchange = build_exchange(model)
    with pytest.raises(RuntimeError, match="without arm"):
        exchange.finish()
    exchange.arm()
    with pytest.raises(RuntimeError, match="armed twice"):
        exchange.arm()
    backward(model)
    with pytest.raises(RuntimeError, match=r"gradient of 4\.\w+ came twice"):
        backward(model)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_optimizers_own_zero_grad_is_as_good(set_to_none):
    model = build_model()
    reference = copy.deepcopy(model)
    backward(reference)
    exchange = build_exchange(model)
    for _ in range(2):
        model.zero_grad(set_to_none=set_to_none)
        exchange.arm()
        backward(model)
        exchange.finish()
    for param, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(param.grad, expected.grad)


def test_gradients_of_the_update_before_do_not_come_back():
    model = build_model()
    exchange = build_exchange(model)
    exchange.arm()
    backward(model)
    exchange.finish()
    exchange.zero_grad()
    exchange.arm()
    exchange.finish()
    assert all((param.grad == 0).all() for param in model.parameters())


def test_a_closed_exchange_leaves_the_model_alone():
    model = build_model()
    exchange = build_exchange(model)
    exchange.close()
    exchange.arm()
    backward(model)
    assert exchange._compressor.started == []


def test_large_gradients_have_a_norm_and_others_have_none():
    flats = [torch.full((100,), 3.0), torch.full((7,), -2.0)]
    norm = (900 + 28) ** 0.5
    for scale in (1.0, 1e18, 1e30, 1e38):
        assert global_norm([flat * scale for flat in flats]) == pytest.approx(norm * scale, rel=1e-6)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not math.isfinite(global_norm([flats[0], torch.tensor([1.0, bad])]))
    assert global_norm([]) == 0


def test_an_update_with_large_gradients_is_used():
    model = build_model()
    exchange = build_exchange(model)
    exchange.arm()
    (model(torch.ones(1, 3, 6, 6)).sum() * 1e30).backward()
    norm = exchange.finish().norm
    assert norm > 1e30
    assert math.isfinite(norm)
    assert exchange._compressor.lossy.update == 1
