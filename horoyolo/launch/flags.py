"""The flags of ``horoyolo launch``."""

from __future__ import annotations

import argparse
from pathlib import Path


def describe_launch(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``launch``: where, how many, by what, and what else to do than start."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", metavar="FILE", help="hosts and their slots: Open MPI's, MPICH's and PBS's forms")
    where.add_argument("--hosts", "-H", metavar="a:4,b:4", help="hosts and their slots")
    where.add_argument("--slurm", action="store_true", help="the hosts of this Slurm allocation; with --script: a batch script")
    parser.add_argument("-np", "--num-proc", type=int, default=None, metavar="N", help="workers; by default one a slot, one without hosts")
    parser.add_argument("--launcher", default=None, help="horovodrun (default), mpirun, hydra, or slurm (srun)")
    parser.add_argument("--transport", default="gloo", choices=("gloo", "mpi"), help="what horovodrun's workers talk by")
    parser.add_argument("--nic", default="", metavar="IF", help="interface between the hosts; by default the one that leads to the first of them")
    parser.add_argument("--ssh-port", type=int, default=None, metavar="N")
    parser.add_argument("--ssh-identity", default="", metavar="FILE", help="private key for ssh")
    parser.add_argument("-x", dest="variables", action="append", default=[], metavar="NAME", help="a variable that workers on other hosts get too")
    parser.add_argument("--stage", type=Path, default=None, metavar="DIR", help="copy the data set into this folder of each host first")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would run")
    what.add_argument("--script", type=Path, default=None, metavar="OUT", help="write it as a script that runs by itself")
    parser.add_argument("job", nargs=argparse.REMAINDER, metavar="-- train ...", help="what every worker runs")
