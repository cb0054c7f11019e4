"""Which device a worker computes on, and in which precision and memory layout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from horoyolo.config import Config, InputError
from horoyolo.distributed.comm import sums_by_nccl
from horoyolo.engine.bf16 import lacks_bf16, rounded_convolutions


@dataclass(frozen=True)
class Numerics:
    """How a forward pass computes: its device, the dtype of convolutions, the memory layout of images and weights."""

    device: torch.device
    dtype: torch.dtype  # float32, bfloat16 or float16
    memory_format: torch.memory_format

    @property
    def kind(self) -> str:
        """On what kind of device in which precision: what has to be the same on all workers."""
        return f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}"

    def describe(self) -> str:
        """For a log line: device, precision, layout."""
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {str(self.memory_format).removeprefix('torch.')}"

    def autocast(self) -> AbstractContextManager:
        """The context a forward pass runs in."""
        if self.dtype == torch.float32:
            return nullcontext()
        if self.device.type == "cpu" and lacks_bf16():
            return rounded_convolutions()
        return torch.autocast(self.device.type, self.dtype)

    def as_input(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) as floats from 0 to 1 on the device."""
        images = images.to(self.device, non_blocking=True)
        return images.to(memory_format=self.memory_format).float().div_(255)


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a worker: ``cpu``, ``cuda``, GPU numbers such as ``0,1``, or empty for cuda where there is one.

    Workers of a host take the named GPUs in turn, by ``local_rank`` modulo their number (some schedulers show each worker a single GPU).
    Raises InputError for a device that this machine lacks.
    """
    wanted = wanted.strip().lower()
    if wanted == "cpu" or (not wanted and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = wanted.removeprefix("cuda").removeprefix(":")
    try:
        numbers = [int(part) for part in names.split(",")] if names else list(range(count))
    except ValueError:
        raise InputError(f"--device {wanted}: cpu, cuda or GPU numbers such as 0,1 are wanted") from None
    if not numbers or max(numbers) >= count or min(numbers) < 0:
        raise InputError(f"--device {wanted}: this machine shows {count} GPUs; cpu works everywhere")
    return torch.device("cuda", numbers[local_rank % len(numbers)])


def own_gpu(device: torch.device) -> str:
    """What names a GPU that two workers can't share, since Horovod sums by NCCL there; empty where they can, and on CPUs."""
    if device.type != "cuda" or not sums_by_nccl():
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def numerics_for(device: torch.device, precision: str) -> Numerics:
    """The numerics of ``precision`` on ``device``; ``auto`` takes bf16 where the device has instructions for it, fp32 elsewhere.

    channels_last is the faster layout for convolutions on CPUs and, in half precision, on GPUs with tensor cores.
    Raises InputError for fp16 on a CPU.
    """
    on_gpu = device.type == "cuda"
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    if precision == "fp16" and not on_gpu:
        raise InputError("--precision fp16: a GPU is wanted; on a CPU bf16 is the half precision")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    layout = torch.contiguous_format if on_gpu and dtype == torch.float32 else torch.channels_last
    return Numerics(device, dtype, layout)


def cycle_time_ms(config: Config) -> float:
    """How often Horovod looks for work: at once for a synchronised BatchNorm and for GPUs, less often where that takes time from computing cores.

    A collective with nothing to hide behind waits that long: steps of YOLOv5s with powersgd between two hosts (a core each, 256 Mbit/s) took
    0.28 s with 3 ms and 0.35 s with 10 ms; plain ones took the same.
    """
    on_gpu = torch.cuda.is_available() and config.device.lower() != "cpu"
    return 1.0 if config.comms.sync_bn or on_gpu else 3.0


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
