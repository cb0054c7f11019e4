"""Rates follow the images seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horoyolo.config import Hyper, Optim
from horoyolo.engine.schedule import Schedule


def schedule(batch: int = 16, epochs: int = 100, batches: int = 50, **optim: object) -> Schedule:
    return Schedule(Hyper(), Optim(**optim), epochs, batch, batches)  # type: ignore[arg-type]


def test_warm_up_starts_with_slow_weights_and_fast_biases() -> None:
    rates = schedule().at(0, 0)
    assert (rates.lr, rates.bias_lr, rates.momentum, rates.accumulate) == (0.0, 0.1, 0.8, 1)


def test_after_warm_up_all_rates_agree() -> None:
    plan = schedule()
    assert plan.warmup_batches == 150
    rates = plan.at(3, 150)
    assert rates.lr == rates.bias_lr == pytest.approx(0.01 * (0.97 * 0.99 + 0.01))
    assert (rates.momentum, rates.accumulate) == (0.937, 4)


@pytest.mark.parametrize("cos_lr", [False, True])
def test_decay_goes_down_from_one_to_lrf(cos_lr: bool) -> None:
    plan = schedule(cos_lr=cos_lr)
    decays = [plan.decay(epoch) for epoch in range(101)]
    assert decays[0] == 1
    assert decays[100] == pytest.approx(0.01)
    assert decays == sorted(decays, reverse=True)
    assert plan.decay(50) == pytest.approx(0.505)


def test_small_data_warms_up_for_a_hundred_batches_and_none_when_off() -> None:
    assert schedule(batches=13).warmup_batches == 100
    assert Schedule(Hyper(warmup_epochs=0), Optim(), 10, 16, 13).warmup_batches == 0


@pytest.mark.parametrize(("batch", "accumulate"), [(16, 4), (48, 1), (64, 1), (128, 1), (20, 3)])
def test_updates_accumulate_to_the_nominal_batch_and_decay_keeps_pace(batch: int, accumulate: int) -> None:
    plan = schedule(batch=batch)
    assert plan.full_accumulate == accumulate
    assert plan.weight_decay == pytest.approx(0.0005 * batch * accumulate / 64)


def test_accumulation_can_be_turned_off() -> None:
    plan = schedule(nominal_batch=0)
    assert {plan.at(0, step).accumulate for step in range(200)} == {1}
    assert plan.weight_decay == 0.0005


@given(st.integers(1, 64), st.sampled_from(["sgd", "adam", "adamw"]))
def test_up_to_the_nominal_batch_nothing_is_scaled(batch: int, optimizer: str) -> None:
    plan = schedule(batch=batch, optimizer=optimizer)
    assert (plan.peak_lr, plan.clip_norm, plan.warmup_batches) == (0.01, 10.0, 150)


@given(st.integers(64, 4096))
def test_beyond_the_nominal_batch_steps_grow_by_the_square_root(batch: int) -> None:
    """Of SGD's update that is rate times images, of Adam's the rate; and warm-up takes as many times the images."""
    plan, adam = schedule(batch=batch, batches=10000 // batch), schedule(batch=batch, optimizer="adamw")
    growth = (batch / 64) ** 0.5
    assert plan.peak_lr * batch == pytest.approx(0.01 * 64 * growth)
    assert adam.peak_lr == pytest.approx(0.01 * growth)
    assert plan.clip_norm == pytest.approx(10 * batch / 64)
    shortest_images = 100 * 64
    images = max(3 * (10000 // batch) * batch, shortest_images) * growth
    assert abs(plan.warmup_batches * batch - images) <= batch * (0.5 + 0.5 * growth)
    assert plan.at(0, 0).bias_lr * batch == pytest.approx(0.1 * 64 * growth)


def test_without_a_nominal_batch_rates_are_as_given() -> None:
    plan = schedule(batch=512, nominal_batch=0)
    assert (plan.peak_lr, plan.clip_norm, plan.warmup_batches) == (0.01, 10.0, 150)
