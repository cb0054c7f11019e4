"""The flags of the benches, apart from their code: the command line is built without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from horoyolo.flag_types import above_zero, file_to_write, not_negative, positive, positives
from horoyolo.launch.flags import describe_hosts

LAUNCHERS = ("horovodrun", "mpirun")
LAYOUTS = ("channels_last", "NCHW")
SIZES = [4**power for power in range(1, 14)]  # 4 B to 64 MiB
PEERS = ("stock", "stock-fp16", "ddp", "ddp-nchw", "ddp-fp16", "ddp-fp16-nchw", "ddp-powersgd")
ELASTIC_PEERS = ("stock", "torchrun")


def describe_step(parser: argparse.ArgumentParser) -> None:
    """``bench step``: one process, precisions and layouts side by side, or image sizes and batches."""
    parser.add_argument("--cfg", default="yolov5s")
    several = "; several, such as %s: each with each, in the precision and layout that training takes, with the memory they need"
    parser.add_argument("--img", type=positives, default=[320], metavar="PX,...", help="side in pixels" + several % "320,480,640")
    parser.add_argument("--batch", type=positives, default=[16], metavar="N,...", help="images a step" + several % "8,16,32")
    parser.add_argument("--steps", type=positive, default=10, help="steps a repeat")
    _describe_repeats(parser)
    _describe_precision(parser)
    parser.add_argument("--device", default="", help="cpu, cuda or a GPU number")


def describe_scaling(parser: argparse.ArgumentParser) -> None:
    """``bench scaling``: several workers with an exchange every step, against the same processes without any."""
    _describe_workers(parser)
    _describe_model(parser, cfg="yolov5s", batch=4)
    _describe_repeats(parser)
    _describe_precision(parser)
    _describe_launchers(parser, [*LAUNCHERS])
    parser.add_argument("--layouts", nargs="+", default=[*LAYOUTS], choices=LAYOUTS, help="of images and weights in memory")
    parser.add_argument("--peer", default="", metavar="SCRIPT", help="stock Horovod's worker to run beside ours: scripts/peers/stock_horovod.py")


def describe_allreduce(parser: argparse.ArgumentParser) -> None:
    """``bench allreduce``: a sum over workers, by size."""
    _describe_workers(parser)
    _describe_repeats(parser)
    _describe_launchers(parser, ["horovodrun"])
    parser.add_argument("--sizes", type=positive, nargs="+", default=SIZES, metavar="BYTES", help="what to sum; by default 4 B to 64 MiB")
    parser.add_argument("--plot", type=file_to_write, default=None, metavar="FILE.png")


def describe_compression(parser: argparse.ArgumentParser) -> None:
    """``bench compression``: what each way to sum gradients costs, on links of several speeds."""
    _describe_workers(parser)
    _describe_model(parser, cfg="yolov5s", batch=4)
    _describe_repeats(parser)
    _describe_precision(parser)
    parser.add_argument("--launcher", default="horovodrun", choices=LAUNCHERS)
    entries = "ways to sum, such as none int8 powersgd:powersgd_rank=2; by default all but auto"
    parser.add_argument("--entries", nargs="+", default=None, metavar="NAME[:KEY=VALUE,...]", help=entries)
    when = "when gradients leave: while backward runs (yes), after it (no); by default both, each a row of its own"
    parser.add_argument("--overlap", nargs="+", default=["no", "yes"], choices=("no", "yes"), help=when)
    links = (
        "link speeds as tc writes them, such as 50mbit 1gbit; 0 (the default) leaves the link as it is. For any other, `tc qdisc` limits what "
        "each host sends through its interface: this needs root on all hosts, slows down everything else there, replaces the rules that the "
        "interface has, and leaves the kernel's default behind"
    )
    parser.add_argument("--links", nargs="+", default=None, metavar="RATE", help=links)
    ratio = "also links on which summing plainly takes R times as long as a step computes, which is measured before each repeat"
    parser.add_argument("--link-ratio", nargs="+", type=above_zero, default=[], metavar="R", help=ratio)
    peers = "others in the same alternating repeats: stock Horovod's optimizer and PyTorch DDP over Gloo with its hooks; bare: all of them"
    parser.add_argument("--peers", nargs="*", default=None, choices=PEERS, help=peers)
    parser.add_argument("--plot", type=file_to_write, default=None, metavar="FILE.png")


def describe_elastic(parser: argparse.ArgumentParser) -> None:
    """``bench elastic``: workers are killed, and runs left alone."""
    _describe_workers(parser, num_workers=3)
    _describe_model(parser, cfg="yolov5n", img=64, batch=4, steps=100)
    _describe_repeats(parser, not_negative)
    parser.add_argument("--kills", type=not_negative, default=20, help="of a worker of an elastic run, one a run; 0: step rates alone")
    peer_kills = "so many of them are done to each peer too: torchrun takes two minutes over one"
    parser.add_argument("--peer-kills", type=not_negative, default=5, help=peer_kills)
    parser.add_argument("--limit", type=above_zero, default=60.0, metavar="SECONDS", help="a run that has not gone on by then never does")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    peers = "others in turn: stock Horovod's elastic run with TorchState, DDP under torchrun; bare: both"
    parser.add_argument("--peers", nargs="*", default=None, choices=ELASTIC_PEERS, help=peers)
    parser.add_argument("--folder", default="runs/bench", help="where runs write meanwhile; all hosts see it")


def _describe_workers(parser: argparse.ArgumentParser, num_workers: int = 2) -> None:
    describe_hosts(parser)
    how_many = f"workers, each with one thread; by default {num_workers}, or one a slot"
    parser.add_argument("-np", "--num-proc", type=int, default=None, metavar="N", help=how_many)
    parser.set_defaults(num_here=num_workers)


def _describe_model(parser: argparse.ArgumentParser, cfg: str, batch: int, img: int = 320, steps: int = 10) -> None:
    parser.add_argument("--cfg", default=cfg)
    parser.add_argument("--img", type=positive, default=img, help="side in pixels")
    parser.add_argument("--batch", type=positive, default=batch, help="images a step of each process")
    parser.add_argument("--steps", type=positive, default=steps, help="steps a repeat")


def _describe_repeats(parser: argparse.ArgumentParser, number: Callable[[str], int] = positive) -> None:
    parser.add_argument("--repeats", type=number, default=5, help="repeats of each variant, in turn")
    parser.add_argument("--json", type=file_to_write, default=None, metavar="FILE")


def _describe_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 where this CPU has it")


def _describe_launchers(parser: argparse.ArgumentParser, default: list[str]) -> None:
    parser.add_argument("--launchers", "--launcher", nargs="+", default=default, choices=LAUNCHERS, help="Gloo by horovodrun, MPI by mpirun")
