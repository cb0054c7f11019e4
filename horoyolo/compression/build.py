"""Which compressors there are."""

from __future__ import annotations

from collections.abc import Callable

from horoyolo.compression.base import Compressor, Lossy
from horoyolo.compression.dense import Dense
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.warmup import WarmUp
from horoyolo.config import Comms, InputError

COMPRESSORS: dict[str, Callable[[Comms], Compressor]] = {
    "none": lambda comms: Dense(),
}


def build_compressor(comms: Comms) -> Compressor:
    """The compressor that ``comms.compression`` names; raises InputError naming the known ones."""
    if comms.compression not in COMPRESSORS:
        raise InputError(f"unknown compression {comms.compression!r} (--compression): known are {', '.join(COMPRESSORS)}")
    return COMPRESSORS[comms.compression](comms)


def _late(lossy: Lossy, comms: Comms) -> Compressor:
    return WarmUp(ErrorFeedback(lossy), comms.warmup_updates)
