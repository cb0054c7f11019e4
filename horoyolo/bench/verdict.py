"""What follows from the figures of ``bench compression``: below which link speed an entry gains, and what choosing by measurement costs."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Mapping
from typing import Any

from horoyolo.bench.figures import paired_ratio
from horoyolo.bench.links import AS_IT_IS
from horoyolo.compression.build import AUTO, COMPRESSORS

OVERLAPPED = ", overlapped"
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def auto_against_best(step_s: Mapping[str, list[float]]) -> tuple[str, float] | None:
    """The quickest of the fixed rows by every second repeat, and how many times its step `auto`'s is in the others, the median of pairs.

    ``step_s``: row -> its step's time in each repeat. None where there is no such comparison: no `auto`, nothing beside it, a single repeat.
    """
    fixed = {name: times for name, times in step_s.items() if name.removesuffix(OVERLAPPED).partition(":")[0] in COMPRESSORS}
    auto = next((times for name, times in step_s.items() if name.partition(":")[0] == AUTO), [])
    if not fixed or len(auto) < 2:
        return None
    best = min(fixed, key=lambda name: statistics.median(fixed[name][::2]))
    return best, paired_ratio(fixed[best][1::2], auto[1::2])


def break_even_bits(links: Mapping[str, Mapping[str, Any]], entry: str) -> float | None:
    """The link speed, in bit/s, below which ``entry`` makes steps shorter than `none`, each at its better time to leave.

    A step's time is taken as linear in the seconds that a bit takes, between the links that were measured; a link left as it is counts as one
    that takes no time. None where there is no such speed: it gains on all those links, on none, or on some in between.
    """
    points = sorted((0.0 if link["rate"] == AS_IT_IS else 1 / bits_per_s(link["rate"]), gain_s(link["rows"], entry)) for link in links.values())
    changes = [(quicker, slower) for quicker, slower in itertools.pairwise(points) if (quicker[1] > 0) != (slower[1] > 0)]
    if len(changes) != 1 or points[0][1] > 0:
        return None
    (quicker, gain_there), (slower, gain_here) = changes[0]
    return 1 / (quicker + (slower - quicker) * gain_there / (gain_there - gain_here))


def gain_s(rows: Mapping[str, Mapping[str, float]], entry: str) -> float:
    """Seconds a step by which ``entry`` is quicker than `none`."""
    plain_s, entry_s = (min(rows[row]["median_s"] for row in (name, name + OVERLAPPED) if row in rows) for name in ("none", entry))
    return plain_s - entry_s


def bits_per_s(rate: str) -> float:
    """A rate as tc writes it in bits a second; tc's ``bps`` are bytes."""
    found = re.fullmatch(r"([0-9.]+)([kmg]?)(bit|bps)", rate.lower())
    assert found
    number, unit, kind = found.groups()
    return float(number) * UNITS[unit] * (8 if kind == "bps" else 1)


def verdict_lines(links: Mapping[str, Mapping[str, Any]], entries: list[str]) -> list[str]:
    """What the figures of all links say of each entry and of `auto`, a line each."""
    lines = []
    for entry in entries if "none" in entries and len(links) > 1 else []:
        if entry == "none" or entry.partition(":")[0] == AUTO:
            continue
        bits = break_even_bits(links, entry)
        if bits is not None:
            lines.append(f"{entry}: gains below {bits / 1e6:.0f} Mbit/s")
        else:
            gains = {gain_s(link["rows"], entry) > 0 for link in links.values()}
            on = {frozenset([True]): "gains on all", frozenset([False]): "gains on none"}.get(frozenset(gains), "gains on some (no clear limit)")
            lines.append(f"{entry}: {on} of these links")
    for label, link in links.items():
        if link.get("auto"):
            lines.append(f"link {label}: auto takes {link['auto']['time_ratio']:.3f} of the step of {link['auto']['best']}, the best fixed entry")
    return lines
