"""The doctor's findings as text: what all hosts have in common once, a row a host, then what is wrong and what helps."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from horoyolo.launch.hosts import Host
from horoyolo.launch.judge import ERROR, SAME, WARNING, Cluster, Finding, Link, address_of, size_text

WIDTH = 120
HEADINGS = ("host", "address", "slots", "cores", "GPUs", "sends", "round trip", "workdir", "/tmp", "/dev/shm", "files", "memlock", "clock", "result")


def render(cluster: Cluster, findings: Sequence[Finding]) -> str:
    """The whole text."""
    parts = [*_common(cluster), "", *_rows(cluster, findings), "", *_measured(cluster)]
    for severity in (ERROR, WARNING):
        for group in _alike(finding for finding in findings if finding.severity == severity):
            parts += ["", *_told(group)]
    return "\n".join([*parts, "", _summary(cluster, findings)])


def _common(cluster: Cluster) -> list[str]:
    """What most hosts have."""
    values = {check: [value for facts in cluster.facts.values() if (value := read(facts))] for check, (read, _) in SAME.items()}
    values["data"] = [facts["data"]["hash"][:12] for facts in cluster.facts.values() if "hash" in facts.get("data", {})]
    lines = []
    for check, known in values.items():
        if known:
            value, count = Counter(known).most_common(1)[0]
            most = "" if count == len(cluster.hosts) else f"  (on {count} of {len(cluster.hosts)} hosts)"
            lines.append(f"{check:<9} {value}{most}")
    return lines


def _rows(cluster: Cluster, findings: Sequence[Finding]) -> list[str]:
    rows = [HEADINGS, *(_row(cluster, host, findings) for host in cluster.hosts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 1, len(HEADINGS) - 1}  # words; numbers go to the right
    lines = []
    for row in rows:
        cells = (cell.ljust(width) if at in left else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(cluster: Cluster, host: Host, findings: Sequence[Finding]) -> tuple[str, ...]:
    result = _counted([finding for finding in findings if finding.host == host.name]) or "ok"
    facts = cluster.facts.get(host.name)
    if facts is None:
        return (host.name, "-", str(host.slots), *["-"] * (len(HEADINGS) - 4), result)
    link = next((link for link in cluster.links if link.source == host.name), None)
    clock = facts["clock"]
    return (
        *(host.name, address_of(facts, cluster.nic) or "-", str(host.slots), str(facts["cores"]), str(len(facts["gpus"]))),
        *_figures(link),
        *(_free(facts["disks"][check]) for check in ("workdir", "tmp", "shm")),
        _limit(facts["limits"]["nofile"]),
        "unlimited" if facts["limits"]["memlock"] < 0 else size_text(facts["limits"]["memlock"]),
        f"{clock['offset_s']:+.3f} s" if abs(clock["offset_s"]) >= clock["doubt_s"] else f"<{max(clock['doubt_s'], 0.001):.3f} s",
        result,
    )


def _figures(link: Link | None) -> tuple[str, str]:
    if link is None:
        return "-", "-"
    if link.error:
        return "fails", "-"
    return rate_text(link.mbit_s), f"{link.round_trip_ms:.2f} ms"


def rate_text(mbit_s: float) -> str:
    """A bandwidth in words, such as 9.4 Gbit/s."""
    return f"{mbit_s / 1000:.1f} Gbit/s" if mbit_s >= 1000 else f"{mbit_s:.0f} Mbit/s"


def _free(disk: dict[str, Any]) -> str:
    return "-" if "error" in disk else size_text(disk["free"])


def _limit(number: int) -> str:
    return "unlimited" if number < 0 else str(number)


def _measured(cluster: Cluster) -> list[str]:
    """How the ways between hosts were measured."""
    lines = []
    if cluster.links:
        over = f" over {cluster.nic}" if cluster.nic else ""
        lines.append(f"sends, round trip: to the next host of the list{over}, all at once, over TCP by the doctor's own probe")
    ranks = cluster.mpi.get("ranks", [])
    if ranks:
        slowest, longest = min(rank["mbit_s"] for rank in ranks), max(rank["round_trip_ms"] for rank in ranks)
        made = f"{cluster.mpi['library']}, mpi4py {cluster.mpi['mpi4py']}"
        lines.append(f"over MPI ({made}), the same ring: at least {rate_text(slowest)}, round trip at most {longest:.2f} ms")
    elif cluster.mpi:
        lines.append(f"not measured over MPI: {cluster.mpi.get('skipped') or cluster.mpi.get('error')}")
    return lines


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings that differ in nothing but the host, together."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.check, _without(finding.host, finding.message), _without(finding.host, finding.remedy))
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _without(host: str, text: str) -> str:
    return re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST", text)


def _told(group: Sequence[Finding]) -> list[str]:
    first = group[0]
    several = len(group) > 1
    hosts = ", ".join(finding.host for finding in group)
    message, remedy = (_without(first.host, text) if several else text for text in (first.message, first.remedy))
    head = f"{first.severity:<7} {hosts}: {first.check}: {message}"
    return [*_wrapped(head, " " * 8), *_wrapped(f"{'':<8}-> {remedy}", " " * 11)]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True)


def _summary(cluster: Cluster, findings: Sequence[Finding]) -> str:
    number = len(cluster.hosts)
    return f"{number} host{'s' * (number != 1)}: {_counted(findings) or 'all is well'}"


def _counted(findings: Sequence[Finding]) -> str:
    numbers = Counter(finding.severity for finding in findings)
    return ", ".join(f"{numbers[severity]} {severity}{'s' * (numbers[severity] != 1)}" for severity in (ERROR, WARNING) if numbers[severity])
