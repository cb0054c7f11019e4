"""Which ways to sum there are, and the compressors made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Entry:
    """A way to sum: how it is made, and the settings, fields of ``Comms``, that it is made from."""

    make: Callable[[Comms], Lossy]
    settings: tuple[str, ...] = ()


# In falling order of faithfulness, of the last three by the losses with which trainings end (scripts/bench_accuracy.py): of those that are about as
# quick, `auto` takes the first.
COMPRESSORS: dict[str, Entry] = {
    "none": Entry(lambda comms: Dense()),
    "fp16": Entry(lambda comms: Scatter(Float16())),
    "bf16": Entry(lambda comms: Scatter(BFloat16())),
    "int8": Entry(lambda comms: _int8(comms), ("int8_block",)),
    "onebit": Entry(
        lambda comms: _late(SmallApart(_int8(comms), Scatter(OneBit(comms.onebit_block))), comms),
        ("onebit_block", "int8_block", "warmup_updates"),
    ),
    "topk": Entry(
        lambda comms: SmallApart(_int8(comms), TopK(comms.topk_ratio, comms.warmup_updates)),
        ("topk_ratio", "int8_block", "warmup_updates"),
    ),
    "powersgd": Entry(lambda comms: _late(PowerSGD(comms.powersgd_rank), comms), ("powersgd_rank", "warmup_updates")),
}
AUTO = "auto"
NAMES = (*COMPRESSORS, AUTO)


def settings_of(name: str) -> list[str]:
    """The fields of ``Comms`` that make a difference to an entry, `auto` among them, in order."""
    entries = COMPRESSORS.values() if name == AUTO else [COMPRESSORS[name]]
    return sorted({setting for entry in entries for setting in entry.settings})


def describe_compression(comms: Comms) -> str:
    """The compression with its settings, as one string: equal strings go on from each other's state."""
    return ", ".join([comms.compression, *(f"{name}={getattr(comms, name)}" for name in settings_of(comms.compression))])


def build_compressor(comms: Comms, overlaps: tuple[bool, ...] = (True,)) -> Compressor:
    """The compressor that ``comms.compression`` names; buckets leave while backward runs (True) or after it (False).

    Where there is a choice, of entries (`auto`) or of ``overlaps``, it measures and chooses.
    """
    name = comms.compression
    if name == AUTO:
        steady = replace(comms, warmup_updates=0)
        makers = {each: partial(entry.make, steady) for each, entry in COMPRESSORS.items()}
        return Auto(makers, overlaps, plain_updates=comms.warmup_updates)
    if len(overlaps) > 1:
        return Auto({name: partial(COMPRESSORS[name].make, comms)}, overlaps)
    return ErrorFeedback(COMPRESSORS[name].make(comms), overlaps[0])


def _int8(comms: Comms) -> Lossy:
    return Scatter(Int8(comms.int8_block))


def _late(lossy: Lossy, comms: Comms) -> Lossy:
    return WarmUp(lossy, comms.warmup_updates)
