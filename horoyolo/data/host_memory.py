"""This host's memory, as far as its control groups let this process use it."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# Of control groups of version 2 and 1: limit, use, and what of that is files read before, which the kernel forgets when it needs room.
_GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def memory_bytes(group: Path = CGROUP) -> tuple[int, int]:
    """What is free and what there is in all. Raises OSError where the kernel does not tell."""
    info = {name: int(value.split()[0]) * 1024 for name, value in _lines(Path("/proc/meminfo"), ":")}
    rooms = [(info["MemAvailable"], info["MemTotal"]), *_group_rooms(group)]
    return min(free for free, _ in rooms), min(total for _, total in rooms)


def _group_rooms(folder: Path) -> list[tuple[int, int]]:
    """What the limits of control groups leave, and the limits; nothing where there is none."""
    rooms = []
    for limit, used, stat, forgettable in _GROUP_FILES:
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            rooms.append((most - now + int(dict(_lines(folder / stat, " "))[forgettable]), most))
        except (OSError, ValueError, KeyError):  # no such version, or the word max
            continue
    return rooms


def _lines(file: Path, separator: str) -> list[tuple[str, str]]:
    """Names and what is told of them."""
    return [(name, value) for name, _, value in (line.partition(separator) for line in file.read_text().splitlines())]
