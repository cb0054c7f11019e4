"""How many images fit, from what a few take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horoyolo.config import Config, InputError, Recipe
from horoyolo.distributed.comm import LocalComm
from horoyolo.engine.auto_batch import Room, agreed_batch, images_that_fit, settle_batch
from horoyolo.engine.device import numerics_for
from horoyolo.engine.memory import available_bytes, peak_bytes
from horoyolo.model.yolo import build_model

CPU = torch.device("cpu")


def device_of(room: int, model: int, an_image: int) -> Callable[[int], int]:
    """A GPU's peaks: of a model and so much an image, and out of memory beyond ``room`` bytes."""

    def bytes_for(images: int) -> int:
        peak = model + images * an_image
        if peak > room:
            raise torch.OutOfMemoryError
        return peak

    return bytes_for


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(2, 5000))
def test_memory_grows_by_the_image(model: int, an_image: int, images: int) -> None:
    budget = an_image * images
    assert images_that_fit(device_of(model + budget, model, an_image), budget) == images


@given(st.integers(0, 10**5), st.integers(1, 10**4), st.integers(0, 10**5))
def test_no_more_than_there_is_and_all_that_there_is(model: int, an_image: int, budget: int) -> None:
    fits = images_that_fit(device_of(model + budget, model, an_image), budget)
    assert fits * an_image <= budget
    if fits > 1 or budget < 2 * an_image:
        assert (fits + 1) * an_image > budget


def test_nobody_gets_more_than_it_can_hold_and_all_get_the_same() -> None:
    rooms = [Room("a", 40, 8.0), Room("b", 24, 5.0), Room("c", 100, 20.0)]
    assert agreed_batch(rooms, 10**6, nominal_batch=64) == 72
    assert agreed_batch(rooms, 500, nominal_batch=64) == 63  # 16 steps an epoch would be 31 images, the nominal batch is more
    assert agreed_batch(rooms, 10, nominal_batch=64) == 9
    assert agreed_batch(rooms, 1, nominal_batch=64) == 3
    with pytest.raises(InputError, match=r"not one image fits into 0\.5 GB of memory on d"):
        agreed_batch([*rooms, Room("d", 0, 0.5)], 100, nominal_batch=64)


def test_a_peak_is_what_was_held_at_most() -> None:
    size = 40_000_000

    def take(count: int) -> None:
        held = [torch.ones(size // 4) for _ in range(count)]
        del held

    small, large = (peak_bytes(CPU, lambda count=count: take(count)) for count in (1, 4))
    assert large - small == pytest.approx(3 * size, rel=0.1)
    assert available_bytes(CPU) > 0


def test_a_real_model_on_this_machine() -> None:
    """What the machine holds is beyond what an epoch should have, so the batch is the largest useful one; the model stays as it was."""
    torch.manual_seed(0)
    model = build_model("yolov5n", 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = Config(img=64, batch=-1, recipe=Recipe(freeze="10"))
    assert settle_batch(config, LocalComm(), numerics_for(CPU, "fp32"), model, num_images=500) == 64
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
