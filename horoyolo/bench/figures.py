"""What the benches print and write in common."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from horoyolo.files import atomic_file


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of the repeats, and the repeats; in seconds."""
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "repeats_s": list(values)}


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times the baseline's rate: the median over repeats, each against the baseline of the same repeat."""
    return statistics.median(b / v for b, v in zip(baseline, values, strict=True))


def machine() -> str:
    """The processor's name."""
    return platform.processor() or platform.machine()


def settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The plain values among the parsed words."""
    return {key: value for key, value in vars(parsed).items() if isinstance(value, (str, int, float, list))}


def progress(line: str) -> None:
    """Says on standard error what is being measured, to somebody who waits."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes ``content`` to ``path``; an empty path: nowhere."""
    if path:
        with atomic_file(path, "w") as stream:
            json.dump(content, stream, indent=1)
