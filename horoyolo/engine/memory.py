"""How much memory a computation takes at its peak, and how much there is to take."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from horoyolo.data.host_memory import memory_bytes


def peak_bytes(device: torch.device, compute: Callable[[], object]) -> int:
    """The most memory in bytes that was taken on ``device`` while ``compute`` ran: of a GPU what tensors took, of a CPU all of this process.

    Memory that was given back before counts as far as the process still holds it: measure the larger of two computations later.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        return torch.cuda.max_memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        compute()
        return _status_bytes("VmHWM")
    except OSError:  # not allowed everywhere: the largest peak so far is as good when computations grow
        compute()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes(device: torch.device) -> int:
    """What can be taken on ``device`` beside what others and this process hold already: of a host by its memory and by its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory_bytes()[0]


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
