"""What compression does to the final score: one training a way to sum and seed, and a table of means.

    python scripts/bench_accuracy.py --data bccd/data.yaml --out runs/accuracy

A training that is finished is not repeated: the script can be stopped and started again, with more entries or seeds.
"""

from __future__ import annotations

import statistics

from trainings import last_ap50, train, train_words, training_flags

ENTRIES = ["fp16", "bf16", "int8", "onebit", "topk", "powersgd", "auto"]


def main() -> None:
    parser = training_flags(__doc__, epochs="60")
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
                name = f"{entry}-seed{seed}"
                train(train_words(parsed, name, seed, parsed.epochs, entry), parsed.num_proc)
                scores.setdefault(entry, []).append(last_ap50(parsed.out / name))
                print_table(scores)


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
