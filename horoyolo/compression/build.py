"""Which compressors there are."""

from __future__ import annotations

from collections.abc import Callable

from horoyolo.compression.base import Compressor
from horoyolo.compression.dense import Dense
from horoyolo.config import InputError

COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "none": Dense,
}


def build_compressor(name: str) -> Compressor:
    """The compressor of that name; raises InputError naming the known ones."""
    if name not in COMPRESSORS:
        raise InputError(f"unknown compression {name!r} (--compression): known are {', '.join(COMPRESSORS)}")
    return COMPRESSORS[name]()
