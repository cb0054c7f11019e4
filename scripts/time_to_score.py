"""How much sooner does a compressed training reach the score that a plain one ends with, on a slow link? Two hosts of a lab, a worker on each.

    scripts/time_to_score.py --data bccd/data.yaml --out runs/sooner --link 50mbit [--entries auto powersgd] [--seeds 0 1 2] [--set hyp.lr0=0.02 ...]

As root (scripts/setup_lab.sh). Times are from the first step to the end of an evaluation, evaluations included. Scores of one training differ from
another's by chance as much as entries do: times and scores are means over seeds, evaluation by evaluation. A training whose scores are in the folder
is not repeated: the script can be started again with more entries or seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "lab")]

from netlab import Lab  # noqa: E402

HOSTS = ["node1", "node2"]
POLL_S = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data.yaml")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--link", required=True, help="the rate of both hosts' links, as tc writes it: 50mbit")
    parser.add_argument("--entries", nargs="+", default=["auto"], help="beside none")
    parser.add_argument("--cfg", default="yolov5n")
    parser.add_argument("--img", default="320")
    parser.add_argument("--batch", default="16")
    parser.add_argument("--epochs", default="60")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--every", default="1", help="epochs between evaluations")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train")
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)

    words = ["train", "--data", str(Path(parsed.data).absolute()), "--cfg", parsed.cfg, "--img", parsed.img, "--batch", parsed.batch]
    words += ["--epochs", parsed.epochs, "--project", str(parsed.out.absolute())]
    words += [word for setting in [*parsed.set, f"evaluate_every={parsed.every}"] for word in ("--set", setting)]
    entries = ["none", *parsed.entries]
    with Lab.up(2) as lab:
        for host in HOSTS:
            lab.shape(host, parsed.link)
        for seed in parsed.seeds:
            for entry in entries:
                train(lab, [*words, "--compression", entry, "--seed", seed], parsed.out / f"{entry}-seed{seed}")
    scores = {entry: mean_scores([read_scores(parsed.out / f"{entry}-seed{seed}") for seed in parsed.seeds]) for entry in entries}
    wanted = scores["none"][-1][1]
    plain_s = reached_s(scores["none"], wanted)
    assert plain_s is not None
    print(f"link of {parsed.link}; AP50 {wanted:.4f}, with which none ends")
    for entry, of_entry in scores.items():
        took_s = reached_s(of_entry, wanted)
        told = "never" if took_s is None else f"after {took_s:.0f} s, {plain_s / took_s:.2f} times as soon as none"
        print(f"{entry:10} {told}; ends with {of_entry[-1][1]:.4f} after {of_entry[-1][0]:.0f} s")
    return 0


def train(lab: Lab, words: list[str], run: Path) -> None:
    """Trains and keeps the timed scores, unless they are there."""
    if scores_file(run).exists():
        return
    if run.exists():
        raise SystemExit(f"{run} is of a training that did not end: remove it")
    scores_file(run).write_text(json.dumps(timed_scores(lab, [*words, "--name", run.name], run)))


def scores_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.json")


def read_scores(run: Path) -> list[tuple[float, float]]:
    return json.loads(scores_file(run).read_text())


def mean_scores(of_seeds: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean time and the mean score of each evaluation."""
    return [(mean(seconds for seconds, _ in each), mean(score for _, score in each)) for each in zip(*of_seeds, strict=True)]


def timed_scores(lab: Lab, words: list[str], run: Path) -> list[tuple[float, float]]:
    """(seconds since the first step, AP50) of each evaluation of a training on both hosts."""
    argv = [sys.executable, "-m", "horoyolo", "launch", "--hosts", ",".join(f"{host}:1" for host in HOSTS), "--", *words]
    scores: list[tuple[float, float]] = []
    began_s = None
    with lab.popen(HOSTS[0], argv, env={"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as process:
        running = True
        while running:
            running = process.poll() is None
            if began_s is None and rows_of(run / "steps.csv"):
                began_s = time.monotonic()
            evaluated = [row for row in rows_of(run / "results.csv") if row["map50"]]
            if began_s is not None and len(evaluated) > len(scores):
                scores.append((time.monotonic() - began_s, float(evaluated[len(scores)]["map50"])))
                print(f"{run.name}: {scores[-1][0]:.0f} s, AP50 {scores[-1][1]:.4f}", file=sys.stderr, flush=True)
            time.sleep(POLL_S)
    if process.returncode or not scores:
        raise SystemExit(f"{run.name}: the training ended with {process.returncode} after {len(scores)} evaluations")
    return scores


def reached_s(scores: list[tuple[float, float]], wanted: float) -> float | None:
    """When a score was reached first; None: never."""
    return next((seconds for seconds, score in scores if score >= wanted), None)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    return [row for row in csv.DictReader(path.read_text().splitlines()) if None not in row.values()]  # read at once: the file grows


if __name__ == "__main__":
    sys.exit(main())
