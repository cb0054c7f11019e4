"""What compression does to the final score: one training a way to sum and seed, and a table of means.

    scripts/bench_accuracy.py --data bccd/data.yaml --out runs/accuracy

A training that is finished is not repeated: the script can be stopped and started again, with more entries or seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ENTRIES = ["fp16", "bf16", "int8", "onebit", "topk", "powersgd", "auto"]


def main() -> None:
    parser = training_flags(__doc__)
    parser.add_argument("-np", "--num-proc", default="2")
    parser.add_argument("--entries", nargs="+", default=ENTRIES, help="beside none")
    parser.add_argument("--seeds", nargs="+", default=["0", "1"])
    parser.add_argument("--plain-seeds", nargs="+", default=["0", "1", "2"], help="of none, whose spread is measured")
    parsed = parser.parse_args()

    scores: dict[str, list[float]] = {}
    # Seed by seed, so that a script that was stopped has something to say about all.
    for seed in dict.fromkeys([*parsed.plain_seeds, *parsed.seeds]):
        for entry in ["none", *parsed.entries]:
            if seed in (parsed.plain_seeds if entry == "none" else parsed.seeds):
                run = train(parsed, entry, seed, parsed.epochs, parsed.num_proc)
                scores.setdefault(entry, []).append(json.loads((run / "metrics.json").read_text())["last"]["map50"])
                print_table(scores)


def training_flags(description: str | None) -> argparse.ArgumentParser:
    """A parser of what all trainings of a comparison have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data.yaml")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cfg", default="yolov5n")
    parser.add_argument("--img", default="320")
    parser.add_argument("--batch", default="16")
    parser.add_argument("--epochs", default="60")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train")
    return parser


def train_words(parsed: argparse.Namespace, entry: str, seed: str, every: str, name: str) -> list[str]:
    """The words after ``launch ... --`` of one training, which is evaluated after ``every`` so many epochs."""
    words = ["train", "--data", str(Path(parsed.data).absolute()), "--cfg", parsed.cfg, "--img", parsed.img, "--batch", parsed.batch]
    words += ["--epochs", parsed.epochs, "--seed", seed, "--compression", entry, "--project", str(parsed.out.absolute()), "--name", name]
    return [*words, *(word for setting in [*parsed.set, f"evaluate_every={every}"] for word in ("--set", setting))]


def train(parsed: argparse.Namespace, entry: str, seed: str, every: str, num_workers: str) -> Path:
    """The run folder of one training on this machine, finished before or now."""
    words = [*train_words(parsed, entry, seed, every, f"{entry}-seed{seed}"), "--resume", "auto"]
    subprocess.run([sys.executable, "-m", "horoyolo", "launch", "-np", num_workers, "--", *words], check=True, stderr=subprocess.DEVNULL)
    return parsed.out / f"{entry}-seed{seed}"


def print_table(scores: dict[str, list[float]]) -> None:
    """Means over seeds, and whether each is at least the mean of none minus the larger of 0.01 and two standard errors of the difference."""
    plain = scores["none"]
    variance = statistics.variance(plain) if len(plain) > 1 else 0.0
    print(f"\n{'':10}{'AP50':>8}{'against none':>14}{'at least':>10}   by seed")
    for entry, values in scores.items():
        mean, error = statistics.mean(values), (variance / len(values) + variance / len(plain)) ** 0.5
        least = statistics.mean(plain) - max(0.01, 2 * error)
        seeds = ", ".join(f"{value:.3f}" for value in values)
        print(f"{entry:10}{mean:8.4f}{mean - statistics.mean(plain):+14.4f}{least:10.4f}   {seeds}{'' if mean >= least else '   BELOW'}", flush=True)


if __name__ == "__main__":
    main()
