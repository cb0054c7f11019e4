"""How much sooner does a compressed training reach the score that a plain one ends with, on a slow link? Two hosts of a lab, a worker on each.

    python scripts/time_to_score.py --data bccd/data.yaml --out runs/time [--entries auto powersgd] [--seeds 0 1 2] [--set hyp.lr0=0.02 ...]

As root (scripts/setup_lab.sh). On the link a plain exchange takes ``--link-ratio`` times as long as a step computes. Plain sums have the same bits on
any link: plain trainings run on this machine, and the first epochs of one on the slow link too, which tells how long epochs take there, and where
losses must be the same. The others run on the slow link from start to end, for ``--entry-epochs`` where that is given: who saves time may spend
some of it on more epochs. Times are from the start to the end of an evaluation.

Scores of one training differ from another's by chance as much as entries do: times and scores are means over seeds, evaluation by evaluation.
A training that is finished is not repeated: the script can be started again with more entries or seeds, but not on trainings of another script,
which are evaluated at other epochs.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from statistics import mean, median

from trainings import train, train_words, training_flags

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "lab")]

from netlab import Lab  # noqa: E402

HOSTS = ["node1", "node2"]
POLL_S = 0.2
STOPPED = 75  # exit status: on request, with a checkpoint

Rows = list[dict[str, str]]
Scores = list[tuple[float, float]]  # (seconds since the start, score) of each evaluation
SCORES = {"AP50": "map50", "AP": "map50_95"}  # and their columns of results.csv; chance has a smaller part in AP, a mean over ten thresholds


def main() -> int:
    parser = training_flags(__doc__, epochs="60")
    parser.add_argument("--entries", nargs="+", default=["auto"], help="beside none")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--entry-epochs", help="of the entries, where they are to train longer or shorter than none")
    parser.add_argument("--link-ratio", type=float, default=4)
    parser.add_argument("--slow-epochs", type=int, default=5, help="of the plain training on the slow link")
    parser.add_argument("--every", default="2", help="epochs between evaluations")
    parsed = parser.parse_args()
    entry_epochs = parsed.entry_epochs or parsed.epochs

    if parsed.slow_epochs <= int(parsed.every):
        parser.error(f"--slow-epochs {parsed.slow_epochs}: more than --every {parsed.every} are wanted, the first one is not counted")

    plain = [parsed.out / f"none-seed{seed}" for seed in parsed.seeds]
    for seed, run in zip(parsed.seeds, plain, strict=True):
        train(train_words(parsed, run.name, seed, parsed.every), str(len(HOSTS)))
    rate = slow_rate(rows_of(plain[0] / "steps.csv"), parsed.link_ratio)
    with Lab.up(len(HOSTS)) as lab:
        for host in HOSTS:
            lab.shape(host, rate)
        begun = parsed.out / "none-slow"
        begin_training(lab, train_words(parsed, begun.name, parsed.seeds[0], parsed.every), begun, parsed.slow_epochs)
        check_same_losses(begun, plain[0])
        for seed in parsed.seeds:
            for entry in parsed.entries:
                run = parsed.out / run_name(entry, entry_epochs, seed)
                whole_training(lab, train_words(parsed, run.name, seed, parsed.every, entry, entry_epochs), run, int(entry_epochs))

    of_plain = [as_on_slow_link(rows_of(run / "results.csv"), rows_of(begun / "results.csv")) for run in plain]
    of_others = {
        entry: [rows_of(parsed.out / run_name(entry, entry_epochs, seed) / "results.csv") for seed in parsed.seeds] for entry in parsed.entries
    }
    print(f"link of {rate}")
    for name, column in SCORES.items():
        scores = {entry: [timed_scores(epochs, column) for epochs in runs] for entry, runs in {"none": of_plain, **of_others}.items()}
        print_table(name, {entry: mean_scores(of_seeds) for entry, of_seeds in scores.items()})
    return 0


def run_name(entry: str, epochs: str, seed: str) -> str:
    """Of a training on the slow link."""
    return f"{entry}-slow-{epochs}-seed{seed}"


def slow_rate(steps: Rows, ratio: float) -> str:
    """The rate, as tc writes it, at which plain sums of a step take ``ratio`` times as long as its forward and backward."""
    compute_s = median(float(row["forward_s"]) + float(row["backward_s"]) for row in steps)
    return f"{8 * max(int(row['wire_bytes']) for row in steps) / (ratio * compute_s) / 1e3:.0f}kbit"


def begin_training(lab: Lab, words: list[str], run: Path, epochs: int) -> None:
    """Trains and stops on request after so many epochs, unless that was done before."""
    if len(rows_of(run / "results.csv")) >= epochs:
        return
    with launched(lab, words, run) as process:
        while process.poll() is None and len(rows_of(run / "results.csv")) < epochs:
            time.sleep(POLL_S)
        if process.poll() is None:
            (run / "STOP").touch()
    ended_with(process, run, 0, STOPPED)  # 0: it came to its end first


def whole_training(lab: Lab, words: list[str], run: Path, epochs: int) -> None:
    """Trains from start to end, unless that was done before."""
    if len(rows_of(run / "results.csv")) < epochs:
        with launched(lab, words, run) as process:
            process.wait()
        ended_with(process, run, 0)


def launched(lab: Lab, words: list[str], run: Path) -> subprocess.Popen:
    if run.exists():
        raise SystemExit(f"{run} is of a training that did not end, whose times are of no use: remove it")
    print(run.name, file=sys.stderr, flush=True)
    argv = [sys.executable, "-m", "horoyolo", "launch", "--hosts", ",".join(f"{host}:1" for host in HOSTS), "--", *words]
    return lab.popen(HOSTS[0], argv, env={"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def ended_with(process: subprocess.Popen, run: Path, *wanted: int) -> None:
    if process.returncode not in wanted:
        raise SystemExit(f"{run.name}: the training ended with {process.returncode}; {run / 'logs'} says why")


def check_same_losses(run: Path, other: Path) -> None:
    """Whether the steps that both did are the same to the last printed digit."""
    for row, of_other in zip(rows_of(run / "steps.csv"), rows_of(other / "steps.csv"), strict=False):
        if any(row[column] != of_other[column] for column in ("step", "batch_crc", "loss")):
            raise SystemExit(f"{run.name} and {other.name} differ in step {row['step']}: what the one takes says nothing of the other")


def as_on_slow_link(epochs: Rows, slow_epochs: Rows) -> Rows:
    """The epochs of a training, each as long as the median of slow ones, those with an evaluation apart."""
    seconds = defaultdict(list)
    for row in slow_epochs[1:]:  # the first one has the start in it
        seconds[bool(row["map50"])].append(float(row["seconds"]))
    return [{**row, "seconds": str(median(seconds[bool(row["map50"])]))} for row in epochs]


def timed_scores(epochs: Rows, column: str) -> Scores:
    """When a training had each of its scores."""
    ends_s = accumulate(float(row["seconds"]) for row in epochs)
    return [(end_s, float(row[column])) for row, end_s in zip(epochs, ends_s, strict=True) if row[column]]


def mean_scores(of_seeds: list[Scores]) -> Scores:
    """The mean time and the mean score of each evaluation."""
    return [(mean(seconds for seconds, _ in each), mean(score for _, score in each)) for each in zip(*of_seeds, strict=True)]


def print_table(name: str, scores: dict[str, Scores]) -> None:
    """When each entry's mean score first was that with which none ends."""
    wanted = scores["none"][-1][1]
    plain_s = reached_s(scores["none"], wanted)
    assert plain_s is not None
    print(f"{name} {wanted:.4f}, with which none ends")
    for entry, of_entry in scores.items():
        took_s = reached_s(of_entry, wanted)
        told = "never" if took_s is None else f"after {took_s:.0f} s, {plain_s / took_s:.2f} times as soon as none"
        print(f"{entry:10} {told}; ends with {of_entry[-1][1]:.4f} after {of_entry[-1][0]:.0f} s")


def reached_s(scores: Scores, wanted: float) -> float | None:
    """When a score was reached first; None: never."""
    return next((seconds for seconds, score in scores if score >= wanted), None)


def rows_of(path: Path) -> Rows:
    """The whole rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    return [row for row in csv.DictReader(path.read_text().splitlines()) if None not in row.values()]  # read at once: the file grows


if __name__ == "__main__":
    sys.exit(main())
