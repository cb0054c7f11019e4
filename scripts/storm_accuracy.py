"""Does a storm of kills, joins and leavings cost accuracy? Undisturbed trainings of several seeds, and one that workers leave and join at random.

    python scripts/storm_accuracy.py --data bccd/data.yaml --out runs/storm [--epochs 100] [--set hyp.lr0=0.02 ...]

The stormy one runs as an elastic job on three hosts of a lab (as root: scripts/setup_lab.sh), with the first seed; its events are drawn from a
seed. Undisturbed trainings that are finished are not repeated. Exit status 0: its ledger is exact, and its AP50 is no lower than the mean of
the undisturbed ones minus the larger of 0.01 and two standard deviations.
"""

from __future__ import annotations

import random
import statistics
import sys
from functools import partial
from pathlib import Path

from trainings import last_ap50, train, train_words, training_flags

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "tests" / "lab")]

from netlab import Lab  # noqa: E402
from rig import Control, Failed, Rig, read_rows  # noqa: E402
from rows import counts, random_event  # noqa: E402

from horoyolo.config import load  # noqa: E402

HOUR_S = 3600.0


def main() -> int:
    parser = training_flags(__doc__, epochs="100")
    parser.add_argument("--close-mosaic", default="0", help="as of train")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--events", type=int, default=20)
    parsed = parser.parse_args()

    def words(name: str, seed: str) -> list[str]:
        return [*train_words(parsed, name, seed, parsed.epochs), "--close-mosaic", parsed.close_mosaic]

    out = parsed.out.absolute()
    for seed in parsed.seeds:
        train(words(f"calm-{seed}", seed), "2")
    calm = [last_ap50(out / f"calm-{seed}") for seed in parsed.seeds]
    mean, deviation = statistics.mean(calm), statistics.stdev(calm)
    least = mean - max(0.01, 2 * deviation)
    print(f"undisturbed: AP50 {', '.join(f'{score:.4f}' for score in calm)}; mean {mean:.4f}, standard deviation {deviation:.4f}", flush=True)
    try:
        happened, score, exact = stormy(words("storm", parsed.seeds[0]), out, parsed.events)
    except Failed as error:
        print(f"storm: {error}", file=sys.stderr)
        return 1
    print(f"{happened}: AP50 {score:.4f}, at least {least:.4f} is wanted; the ledger is {'exact' if exact else 'NOT exact'}")
    return 0 if score >= least and exact else 1


def stormy(words: list[str], out: Path, num_events: int) -> tuple[str, float, bool]:
    """What happened, AP50 of the last epoch, and whether the ledger is exact. Raises Failed where the job ends early or stands still."""
    dice, slots = random.Random(0), {"node1": 1, "node2": 1, "node3": 0}
    with Lab.up(3) as lab:
        rig = Rig(lab, Path(), out, Control([]))
        job = rig.new_job()
        job.run_folder = job.seen_folder = out / "storm"
        with rig.running(job, "node1 slots=1, node2 slots=1", train=words):
            done: list[str] = []
            for moment in sorted(dice.uniform(0.02, 0.98) for _ in range(num_events)):
                job.until(partial(passed, job.run_folder, moment), f"{moment:.0%} of the training", HOUR_S, poll_s=1.0)
                done.append(random_event(job, slots, dice))
                print(f"after {moment:.0%}: {done[-1]}", flush=True)
            status = job.wait(HOUR_S)
            if status != 0:
                raise Failed(f"the job ended with {status}: {job.last_lines()}")
            sizes = [int(row["workers"]) for row in job.rows()]
            return f"{counts(done)}; {min(sizes)} to {max(sizes)} workers", last_ap50(job.run_folder), job.account()["exact"]


def passed(run: Path, moment: float) -> bool:
    """Whether that part of a training is behind it, by its ledger."""
    rows = read_rows(run / "ledger.csv")
    if not rows:
        return False
    epochs = load(run / "config.yaml").epochs
    return int(rows[-1]["epoch"]) + int(rows[-1]["stop"]) / int(rows[-1]["of"]) >= moment * epochs


if __name__ == "__main__":
    sys.exit(main())
