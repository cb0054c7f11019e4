"""The time of an allreduce by the size of what is summed: the part of ``bench allreduce`` that all its processes share. Needs no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

WARMUP = 2


def sweep(sizes: Sequence[int], prepare: Callable[[int], Callable[[], object]]) -> dict[str, float]:
    """Median seconds for each size in bytes; ``prepare(numel)`` gives what sums as many 32-bit floats over all processes once.

    Small ones are measured more often, as often on every process.
    """
    medians = {}
    for num_bytes in sizes:
        allreduce = prepare(max(1, num_bytes // 4))
        times = []
        for _ in range(WARMUP + max(3, min(30, 2**25 // num_bytes))):
            started_s = time.perf_counter()
            allreduce()
            times.append(time.perf_counter() - started_s)
        medians[str(num_bytes)] = statistics.median(times[WARMUP:])
    return medians
