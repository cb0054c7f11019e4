"""Where and how a worker computes."""

from __future__ import annotations

import pytest
import torch

from horoyolo.config import InputError
from horoyolo.engine.device import numerics_for, pick_device

CPU = torch.device("cpu")


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("wanted", "local_rank", "index"),
    [("", 1, 1), ("cuda", 3, 1), ("0,1", 1, 1), ("1", 0, 1), ("1", 5, 1), ("cuda:1", 0, 1), ("1,0", 1, 0), ("1,0", 2, 1)],
)
def test_workers_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, wanted: str, local_rank: int, index: int) -> None:
    pretend_gpus(monkeypatch, 2)
    assert pick_device(wanted, local_rank) == torch.device("cuda", index)


@pytest.mark.parametrize("wanted", ["2", "0,2", "-1", "x", "cuda:x"])
def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(InputError, match=wanted):
        pick_device(wanted, 0)


def test_without_gpus_the_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    assert pick_device("", 0) == pick_device("CPU", 3) == CPU
    with pytest.raises(InputError, match="0 GPUs"):
        pick_device("cuda", 0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_forward_pass_computes_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    numerics = numerics_for(CPU, precision)
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=numerics.memory_format)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with numerics.autocast():
        out = conv(numerics.as_input(images))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_auto_takes_bf16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert numerics_for(CPU, "auto").dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert numerics_for(CPU, "auto").dtype == torch.float32


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="bf16"):
        numerics_for(CPU, "fp16")


def test_pixels_become_floats_from_zero_to_one() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert numerics_for(CPU, "fp32").as_input(images).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert images.flatten().tolist() == [0, 51, 255]
