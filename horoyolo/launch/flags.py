"""The flags of ``horoyolo launch`` and ``doctor``."""

from __future__ import annotations

import argparse
from pathlib import Path

from horoyolo.flag_types import file_to_write
from horoyolo.launch.slurm import describe_slurm


def describe_launch(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``launch``: where, how many, by what, and what else to do than start."""
    describe_elastic(parser, describe_hosts(parser))
    parser.add_argument("-np", "--num-proc", type=int, default=None, metavar="N", help="workers; by default one a slot, one without hosts")
    parser.add_argument("--launcher", default=None, help="horovodrun (default), mpirun, hydra, or slurm (srun; default with --slurm)")
    parser.add_argument("--transport", default="gloo", choices=("gloo", "mpi"), help="what horovodrun's workers talk by")
    parser.add_argument("-x", dest="variables", action="append", default=[], metavar="NAME", help="a variable that workers on other hosts get too")
    parser.add_argument("--stage", type=Path, default=None, metavar="DIR", help="copy the data set into this folder of each host first")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would run")
    what.add_argument("--script", type=Path, default=None, metavar="OUT", help="write it as a script; with --slurm, one for sbatch")
    describe_slurm(parser)
    parser.add_argument("job", nargs=argparse.REMAINDER, metavar="-- train ...", help="what every worker runs")


def describe_doctor(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``doctor``."""
    describe_hosts(parser)
    parser.add_argument("--data", metavar="YAML", default="", help="compare the data set too")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", default=None, help="file for all findings and figures")


def describe_elastic(parser: argparse.ArgumentParser, where: argparse._MutuallyExclusiveGroup) -> None:
    """Adds the flags of an elastic job, among them more ways to name hosts."""
    group = parser.add_argument_group("elastic", "workers may die, come and go while the job runs")
    group.add_argument("--min-np", type=int, default=None, metavar="N", help="make the job elastic: it goes on with as few workers as this")
    group.add_argument("--max-np", type=int, default=None, metavar="N", help="workers at most; by default one a slot, no more than images in a batch")
    where.add_argument("--discovery-script", metavar="FILE", help="a program that prints the hosts, HOST:SLOTS one a line; asked again and again")
    where.add_argument("--kubernetes", action="store_true", help="the pods of this MPIJob, as the MPI Operator lists them")
    group.add_argument("--slots-per-host", type=int, default=None, metavar="N", help="slots of a host that is listed without a number")
    group.add_argument("--hang-timeout", type=float, default=None, metavar="S", help="a worker silent, or in one step, for so long is killed (15)")


def describe_hosts(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Adds the flags that name hosts, the interface between them, and how to log in; gives the group of the first ones."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", metavar="FILE", help="hosts and their slots: Open MPI's, MPICH's and PBS's forms")
    where.add_argument("--hosts", "-H", metavar="a:4,b:4", help="hosts and their slots; without any: this machine")
    where.add_argument("--slurm", action="store_true", help="the hosts of this Slurm allocation")
    parser.add_argument("--nic", default="", metavar="IF", help="interface between the hosts; by default the one that leads to the first of them")
    parser.add_argument("--ssh-port", type=int, default=None, metavar="N")
    parser.add_argument("--ssh-identity", default="", metavar="FILE", help="private key for ssh")
    return where
