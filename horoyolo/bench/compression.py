"""``bench compression``: what each way to sum gradients costs a training step, on links of several speeds, beside the ways of others."""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from horoyolo.bench.compression_worker import row_words
from horoyolo.bench.figures import machine, paired_ratio, progress, settings, spread
from horoyolo.bench.flags import PEERS
from horoyolo.bench.links import AS_IT_IS, check_rate, shaped
from horoyolo.bench.processes import Place, chosen_place, launched, orderly_end, peer_script, side_by_side
from horoyolo.bench.scaling import size_words, worker_argv
from horoyolo.bench.step import variant_name
from horoyolo.bench.verdict import OVERLAPPED, auto_against_best, verdict_lines
from horoyolo.compression.base import ring_bytes
from horoyolo.compression.build import AUTO, COMPRESSORS, NAMES, settings_of
from horoyolo.config import Comms, Config, InputError, check_values, override
from horoyolo.files import write_json

COMPUTE_STEPS = 8  # at least, of workers that only compute: a second or more, since disturbances last as long
OVERLAPS = {"no": (False,), "yes": (True,)}
PARTS = ("encode_s", "wait_s", "decode_s", "wire_bytes", "interface_bytes")  # of a step, beside its time
Rows = list[tuple[str, Comms, tuple[bool, ...]]]
Repeats = dict[str, dict[str, list[float]]]  # row -> figure -> a value for each repeat


def bench_compression(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measures all rows on every link; prints a table for each, writes the JSON and the plot and gives what the JSON holds."""
    place = chosen_place(parsed)
    rows = chosen_rows(parsed.entries or list(COMPRESSORS), parsed.overlap)
    variant = variant_name(parsed.precision, "channels_last")
    peers = peer_jobs(parsed, place, rows, variant.split()[0])
    links = [Link(rate, check_rate(rate, place)) for rate in parsed.links or ([] if parsed.link_ratio else [AS_IT_IS])]
    links += [Link(f"ratio {ratio:g}", ratio=ratio) for ratio in parsed.link_ratio]
    if parsed.link_ratio and not place.nic:
        raise InputError("--link-ratio: only a link between hosts can be made slower; --hosts names some, --nic their interface")

    report: dict[str, Any] = {"machine": machine(), "settings": settings(parsed), "workers": place.num_workers, "links": {}}
    with orderly_end():
        errors: dict[str, dict[str, float]] = {}
        for link in links:
            measured = measure_link(parsed, place, rows, variant, peers, link, with_errors=not errors)
            errors = errors or measured.errors
            told = {"rate": link.rate, **summary(measured.figures, errors)}
            if link.ratio:
                told["compute"] = {**spread(measured.compute_s), "gradient_bytes": measured.gradient_bytes}
                told["rate"] = ratio_rate(link.ratio, told["compute"], place.num_workers)
            report["links"][link.label] = told
            print(f"{place.name}, {_link_name(link.label, told['rate'])}, {parsed.cfg}, {parsed.img} px, {parsed.batch} images each, {variant}")
            print_table(told)
    print("\n".join(verdict_lines(report["links"], parsed.entries or list(COMPRESSORS))))
    if parsed.json:
        write_json(parsed.json, report)
    if parsed.plot:
        from horoyolo.bench.plots import plot_compression

        plot_compression(report["links"], parsed.plot)
    return report


def chosen_rows(entries: Sequence[str], overlaps: Sequence[str]) -> Rows:
    """A row for each entry, NAME[:KEY=VALUE,...] with the keys of ``Comms``, and each time at which buckets may leave; `auto` chooses that time
    itself. What is named twice is one row. Raises InputError for an unknown entry or key, or a value that no training would take."""
    rows: Rows = []
    overlaps = list(dict.fromkeys(overlaps))
    for entry in dict.fromkeys(entries):
        comms = entry_comms(entry)
        if comms.compression == AUTO:
            rows.append((entry, comms, tuple(overlap == "yes" for overlap in overlaps)))
        else:
            rows += [(entry if overlap == "no" else entry + OVERLAPPED, comms, OVERLAPS[overlap]) for overlap in overlaps]
    return rows


def entry_comms(entry: str) -> Comms:
    """What NAME[:KEY=VALUE,...] means."""
    name, _, words = entry.partition(":")
    values: dict[str, Any] = {"comms.compression": name}
    for word in words.split(",") if words else ():
        key, separator, value = word.partition("=")
        if not separator or key == "compression":
            raise InputError(f"--entries {entry}: NAME:KEY=VALUE is wanted, such as powersgd:powersgd_rank=2")
        # Rows are timed after their warm-up, and ``--overlap`` says when their buckets leave.
        known = ["bucket_mb", *(setting for setting in settings_of(name) if setting != "warmup_updates")] if name in NAMES else [key]
        if key not in known:
            raise InputError(f"--entries {entry}: {key} is no setting of {name} here; it has {', '.join(known)}")
        values[f"comms.{key}"] = value
    config = override(Config(), values, f"--entries {entry}")
    try:
        check_values(config)
    except InputError as error:
        raise InputError(f"--entries {entry}: {error}") from None
    return config.comms


@dataclasses.dataclass(frozen=True)
class Peer:
    """What others do in the place of our exchange; ``launcher`` empty: started by us, side by side."""

    name: str
    argv: list[str]
    launcher: str = ""

    def run(self, place: Place) -> dict[str, float]:
        """Step time and bytes of one repeat."""
        job = place.job(self.argv, peer=True)
        return launched(job, place.hosts, self.launcher) if self.launcher else side_by_side(place, job)[0]


def peer_jobs(parsed: argparse.Namespace, place: Place, rows: Rows, precision: str) -> list[Peer]:
    """The peers asked for, DDP's PowerSGD once for each rank among the rows."""
    if parsed.peers is None:
        return []
    words = [*size_words(parsed), "--precision", precision, *(["--nic", place.nic] if place.nic else [])]
    stock, ddp = [*peer_script("stock_horovod.py"), *words], [*peer_script("ddp_hooks.py"), *words]
    known = {
        "stock": [Peer("stock Horovod, NCHW", stock, parsed.launcher)],
        "stock-fp16": [Peer("stock Horovod fp16, NCHW", [*stock, "--compression", "fp16"], parsed.launcher)],
        "ddp": [Peer("DDP, channels_last", ddp)],
        "ddp-nchw": [Peer("DDP, NCHW", [*ddp, "--layout", "NCHW"])],
        "ddp-fp16": [Peer("DDP fp16, channels_last", [*ddp, "--hook", "fp16"])],
        "ddp-fp16-nchw": [Peer("DDP fp16, NCHW", [*ddp, "--hook", "fp16", "--layout", "NCHW"])],
        "ddp-powersgd": [
            Peer(f"DDP powersgd rank {rank}, NCHW", [*ddp, "--hook", "powersgd", "--rank", str(rank), "--layout", "NCHW"])
            for rank in sorted({comms.powersgd_rank for _, comms, _ in rows if comms.compression == "powersgd"})
        ],
    }
    return [peer for name in parsed.peers or PEERS for peer in known[name]]


@dataclasses.dataclass(frozen=True)
class Link:
    """One to be measured on: of a ``rate`` as tc writes it, or on which a plain exchange takes ``ratio`` times as long as a step computes."""

    label: str
    rate: str = AS_IT_IS
    ratio: float = 0.0


@dataclasses.dataclass
class Measured:
    """What was measured on one link."""

    figures: Repeats  # of every row and peer
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # of sums
    compute_s: list[float] = dataclasses.field(default_factory=list)  # of a step, in each repeat, where the link goes by it
    gradient_bytes: int = 0


def measure_compute(parsed: argparse.Namespace, place: Place, variant: str) -> dict[str, float]:
    """Seconds of a step of plain processes that wait for each other in each, and the bytes of the gradients.

    Where a machine disturbs now one worker and now another, steps in step take longer than those of workers by themselves.
    """
    longer = argparse.Namespace(**{**vars(parsed), "steps": max(parsed.steps, COMPUTE_STEPS)})
    first = side_by_side(place, place.job(worker_argv(longer, variant, "--in-step")))[0]
    return {"median_s": first["step_s"], "gradient_bytes": first["gradient_bytes"]}


def ratio_rate(ratio: float, compute: Mapping[str, float], num_workers: int) -> str:
    """The link speed, as tc writes it, at which a ring allreduce of the gradients takes ``ratio`` times the compute time of a step."""
    bits = 8 * ring_bytes(int(compute["gradient_bytes"]), num_workers)
    return f"{bits / (ratio * compute['median_s']) / 1e3:.0f}kbit"


def measure_link(
    parsed: argparse.Namespace, place: Place, rows: Rows, variant: str, peers: Sequence[Peer], link: Link, with_errors: bool
) -> Measured:
    """All rows and peers on one link.

    One job takes all rows in turn, which pairs them best. Where peers take turns too it is started again in each repeat, before or after them; so
    it is where the link goes by what computing takes, which is measured anew each time: on a disturbed machine it is not what it was.
    """
    measured = Measured({name: defaultdict(list) for name in [*(name for name, _, _ in rows), *(peer.name for peer in peers)]})
    num_jobs, repeats = (parsed.repeats, 1) if peers or link.ratio else (1, parsed.repeats)
    words = [*size_words(parsed), "--repeats", str(repeats), "--variant", variant, *row_words(rows), *(["--nic", place.nic] if place.nic else [])]
    argv = [sys.executable, "-m", "horoyolo.bench.compression_worker", *words]
    turns = [None, *peers]  # None stands for our rows
    for number in range(num_jobs):
        rate, so_far = link.rate, f"link {link.label}, job {number + 1} of {num_jobs}"
        if link.ratio:
            progress(f"{so_far}: computing alone")
            compute = measure_compute(parsed, place, variant)
            measured.compute_s.append(compute["median_s"])
            measured.gradient_bytes = int(compute["gradient_bytes"])
            rate = ratio_rate(link.ratio, compute, place.num_workers)
        with shaped(place, rate):
            for peer in random.Random(number).sample(turns, len(turns)):
                progress(f"{so_far}: {peer.name if peer else f'{len(rows)} rows'}")
                if peer is not None:
                    for name, value in peer.run(place).items():
                        measured.figures[peer.name][name].append(value)
                    continue
                numbered = [*argv, "--first-repeat", str(number), *(["--errors"] if with_errors and number == 0 else [])]
                job = launched(place.job(numbered), place.hosts, parsed.launcher)
                measured.errors |= job.get("errors", {})
                for row, of_row in job["rows"].items():
                    for name, values in of_row.items():
                        measured.figures[row][name] += values
    return measured


def summary(figures: Repeats, errors: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Each row's step time and parts, and its rate against the plain way: the quickest of ours without compression and stock Horovod's; and
    how `auto` compares with the best fixed entry."""
    candidates = [name for name in figures if is_plain(name)] or [next(iter(figures))]
    plain = min(candidates, key=lambda name: statistics.median(figures[name]["step_s"]))
    rows = {}
    for name, of_row in figures.items():
        parts = {part: statistics.median(of_row[part]) for part in PARTS if part in of_row}
        ratio = paired_ratio(of_row["step_s"], figures[plain]["step_s"])
        rows[name] = {**spread(of_row["step_s"]), **parts, **errors.get(name, {}), "rate_against_plain": ratio}
    against = auto_against_best({name: of_row["step_s"] for name, of_row in figures.items()})
    return {"plain": plain, "rows": rows, "auto": against and dict(zip(("best", "time_ratio"), against, strict=True))}


def is_plain(name: str) -> bool:
    """Whether a row sums 32-bit floats as they are, ours or stock Horovod's."""
    return name in ("none", "none" + OVERLAPPED, "stock Horovod, NCHW")


def print_table(link: dict[str, Any]) -> None:
    """Times in milliseconds a step, bytes in MB a step of one worker (declared) and of its host (on the wire)."""
    if "compute" in link:
        median_ms, min_ms, max_ms = (link["compute"][which] * 1e3 for which in ("median_s", "min_s", "max_s"))
        print(f"computing alone takes {median_ms:.0f} ms a step ({min_ms:.0f} to {max_ms:.0f} in the repeats)")
    heads = ("ms a step", "min", "max", "encode", "wait", "decode", "MB", "on wire", "error", "fed back", "against plain")
    print(f"{'':34}" + "".join(f"{head:>10}" for head in heads[:-1]) + f"{heads[-1]:>15}")
    for name, row in link["rows"].items():
        times = [row.get(part) for part in ("median_s", "min_s", "max_s", "encode_s", "wait_s", "decode_s")]
        sizes = [row.get(part) or None for part in ("wire_bytes", "interface_bytes")]
        errors = [row.get(part) for part in ("error", "error_with_feedback")]
        cells = [_cell(value, 1e3, 1) for value in times] + [_cell(value, 1e-6, 3) for value in sizes] + [_cell(value, 1, 4) for value in errors]
        print(f"{name:34}" + "".join(cells) + f"{row['rate_against_plain']:14.2f}x")
    print(f"plain: {link['plain']}; errors are parts of the true sum's norm: of one update, of the mean of several with error feedback")


def _cell(value: float | None, scale: float, digits: int) -> str:
    return f"{'-':>10}" if value is None else f"{value * scale:10.{digits}f}"


def _link_name(label: str, rate: str) -> str:
    if rate == AS_IT_IS:
        return "link as it is"
    return f"link of {rate}" if label == rate else f"link of {rate} ({label})"
