"""Pictures of what the benches measured."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from horoyolo.files import atomic_file

PARTS = {"encode_s": "encode", "wait_s": "wait for the network", "decode_s": "decode"}


def plot_allreduce(variants: dict[str, Any], path: str) -> None:
    """Time and bandwidth over size, a line a variant with its span from least to largest."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    time_axes, rate_axes = figure.subplots(1, 2)
    for name, of_run in variants.items():
        sizes = [int(size) for size in of_run]
        milliseconds = {key: [figures[key] * 1e3 for figures in of_run.values()] for key in ("median_s", "min_s", "max_s")}
        (line,) = time_axes.plot(sizes, milliseconds["median_s"], ".-", label=name)
        time_axes.fill_between(sizes, milliseconds["min_s"], milliseconds["max_s"], color=line.get_color(), alpha=0.2, linewidth=0)
        rate_axes.plot(sizes, [figures["bytes_per_s"] / 1e6 for figures in of_run.values()], ".-", label=name)
    for axes, unit in ((time_axes, "milliseconds"), (rate_axes, "MB/s sent by each worker")):
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [_size(size) for size in sizes], rotation=45)
        axes.set_xlabel("size of what is summed")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(framealpha=0.9)
    _save(figure, path)


def plot_compression(links: dict[str, Any], path: str) -> None:
    """A bar a row for each link: the step's time, with the parts that the exchange takes of it."""
    num_rows = max(len(link["rows"]) for link in links.values())
    figure = Figure(figsize=(max(6 * len(links), 8) + 2, 0.32 * num_rows + 2), layout="constrained")
    for axes, (label, link) in zip(figure.subplots(1, len(links), squeeze=False)[0], links.items(), strict=True):
        names = list(link["rows"])
        for place, row in enumerate(link["rows"].values()):
            parts = [row.get(part, 0.0) * 1e3 for part in PARTS]
            left = max(row["median_s"] * 1e3 - sum(parts), 0.0)  # during an overlap parts run beside the backward pass
            axes.barh(place, left, color="tab:gray")
            for number, part in enumerate(parts):
                axes.barh(place, part, left=left, color=f"C{number}")
                left += part
            span = [[(row["median_s"] - row["min_s"]) * 1e3], [(row["max_s"] - row["median_s"]) * 1e3]]
            axes.errorbar(row["median_s"] * 1e3, place, xerr=span, color="black", capsize=2, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title("link as it is" if link["rate"] == "0" else f"link {label}" + (f", {link['rate']}" if label != link["rate"] else ""))
        axes.set_xlabel("milliseconds a step")
        axes.grid(axis="x", alpha=0.3)
    keys = [("tab:gray", "the rest of the step (of a peer: all of it)"), *((f"C{number}", words) for number, words in enumerate(PARTS.values()))]
    for colour, words in keys:
        axes.barh(0, 0, color=colour, label=words)
    figure.legend(loc="outside lower center", ncols=len(keys))
    _save(figure, path)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB"):
        if num_bytes < 1024:
            return f"{num_bytes:g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:g} MiB"


def _save(figure: Figure, path: str) -> None:
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
