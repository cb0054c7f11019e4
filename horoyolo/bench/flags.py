"""The flags of the benches, apart from their code: the command line is built without importing torch."""

from __future__ import annotations

import argparse


def describe_step(parser: argparse.ArgumentParser) -> None:
    """``bench step``: one process, precisions and layouts side by side."""
    _describe_model(parser, cfg="yolov5s", batch=16)
    parser.add_argument("--device", default="", help="cpu, cuda or a GPU number")


def describe_scaling(parser: argparse.ArgumentParser) -> None:
    """``bench scaling``: several workers with an exchange every step, against the same processes without any."""
    _describe_model(parser, cfg="yolov5s", batch=4)
    parser.add_argument("-np", "--num-proc", type=int, default=2, help="workers, each with one thread")
    parser.add_argument("--launchers", nargs="+", default=["horovodrun", "mpirun"], choices=("horovodrun", "mpirun"))
    parser.add_argument("--peer", default="", metavar="SCRIPT", help="stock Horovod's worker to run beside ours: scripts/peers/stock_horovod.py")


def _describe_model(parser: argparse.ArgumentParser, cfg: str, batch: int) -> None:
    parser.add_argument("--cfg", default=cfg)
    parser.add_argument("--img", type=int, default=320, help="side in pixels")
    parser.add_argument("--batch", type=int, default=batch, help="images a step of each process")
    parser.add_argument("--steps", type=int, default=10, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each variant, in turn")
    parser.add_argument("--json", default="", metavar="FILE")
