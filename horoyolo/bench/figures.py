"""What the benches print and write in common."""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of the repeats, and the repeats; in seconds."""
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "repeats_s": list(values)}


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times the baseline's rate: the median over repeats, each against the baseline of the same repeat."""
    return statistics.median(b / v for b, v in zip(baseline, values, strict=True))


def machine() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The plain values among the parsed words."""
    return {key: value for key, value in vars(parsed).items() if isinstance(value, (str, int, float, list))}


def progress(line: str) -> None:
    """Says on standard error what is being measured, to somebody who waits."""
    print(line, file=sys.stderr, flush=True)
