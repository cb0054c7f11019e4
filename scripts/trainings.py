"""Trainings that scripts compare: their common flags, their words, and one of them from start to end on this machine."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def training_flags(description: str | None, epochs: str) -> argparse.ArgumentParser:
    """A parser of what all trainings of a comparison have in common; ``epochs`` unless told otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data.yaml")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cfg", default="yolov5n")
    parser.add_argument("--img", default="320")
    parser.add_argument("--batch", default="16")
    parser.add_argument("--epochs", default=epochs)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train")
    return parser


def train_words(parsed: argparse.Namespace, name: str, seed: str, every: str, compression: str = "none", epochs: str | None = None) -> list[str]:
    """The words after ``launch ... --`` of the training called ``name``, which is evaluated after ``every`` so many epochs."""
    words = ["train", "--data", str(Path(parsed.data).absolute()), "--cfg", parsed.cfg, "--img", parsed.img, "--batch", parsed.batch]
    words += ["--epochs", epochs or parsed.epochs, "--seed", seed, "--compression", compression]
    words += ["--project", str(parsed.out.absolute()), "--name", name]
    return [*words, *(word for setting in [*parsed.set, f"evaluate_every={every}"] for word in ("--set", setting))]


def train(words: list[str], num_workers: str) -> None:
    """Trains on this machine, unless that was done before; goes on with what was begun."""
    argv = [sys.executable, "-m", "horoyolo", "launch", "-np", num_workers, "--", *words, "--resume", "auto"]
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)


def last_ap50(run: Path) -> float:
    """AP50 of a run's last epoch."""
    return json.loads((run / "metrics.json").read_text())["last"]["map50"]
