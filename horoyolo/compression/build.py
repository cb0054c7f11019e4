"""Which ways to sum there are, and the compressors made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from horoyolo.compression.base import Compressor, Lossy
from horoyolo.compression.dense import Dense
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.policy import Auto
from horoyolo.compression.powersgd import PowerSGD
from horoyolo.compression.quantize import BFloat16, Float16, Int8, OneBit
from horoyolo.compression.scatter import Scatter
from horoyolo.compression.small import SmallApart
from horoyolo.compression.topk import TopK
from horoyolo.compression.warmup import WarmUp
from horoyolo.config import Comms

# In falling order of faithfulness, of the last three by the losses with which trainings end (scripts/bench_accuracy.py): of those that are about as
# quick, `auto` takes the first.
COMPRESSORS: dict[str, Callable[[Comms], Lossy]] = {
    "none": lambda comms: Dense(),
    "fp16": lambda comms: Scatter(Float16()),
    "bf16": lambda comms: Scatter(BFloat16()),
    "int8": lambda comms: _int8(comms),
    "onebit": lambda comms: _late(SmallApart(_int8(comms), Scatter(OneBit(comms.onebit_block))), comms),
    "topk": lambda comms: SmallApart(_int8(comms), TopK(comms.topk_ratio, comms.warmup_updates)),
    "powersgd": lambda comms: _late(PowerSGD(comms.powersgd_rank), comms),
}
AUTO = "auto"
NAMES = (*COMPRESSORS, AUTO)


def build_compressor(comms: Comms, overlaps: tuple[bool, ...] = (True,)) -> Compressor:
    """The compressor that ``comms.compression`` names; buckets leave while backward runs (True) or after it (False).

    Where there is a choice, of entries (`auto`) or of ``overlaps``, it measures and chooses.
    """
    name = comms.compression
    if name == AUTO:
        steady = replace(comms, warmup_updates=0)
        makers = {entry: partial(make, steady) for entry, make in COMPRESSORS.items()}
        return Auto(makers, overlaps, plain_updates=comms.warmup_updates)
    if len(overlaps) > 1:
        return Auto({name: partial(COMPRESSORS[name], comms)}, overlaps)
    return ErrorFeedback(COMPRESSORS[name](comms), overlaps[0])


def _int8(comms: Comms) -> Lossy:
    return Scatter(Int8(comms.int8_block))


def _late(lossy: Lossy, comms: Comms) -> Lossy:
    return WarmUp(lossy, comms.warmup_updates)
