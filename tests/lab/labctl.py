"""The lab as a command: ``scripts/lab.sh up 3``."""

from __future__ import annotations

import argparse
import signal
import sys

from netlab import Lab, LabError, labs


def main(words: list[str]) -> int:
    """Do what the words say; 0 when it is done, 1 and a line on standard error when not, and a program's own status for ``exec``."""
    args = _parser().parse_args(words)
    try:
        return args.run(args) or 0
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/lab.sh", description="Several hosts on this machine: node1, node2, ... Needs root.")
    parser.add_argument("--lab", metavar="ID", help="which lab, where several are up (up and status print the ids)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, *arguments: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for argument in arguments:
            sub.add_argument(argument)
        sub.set_defaults(run=run)
        return sub

    command("up", up, "start a lab; prints its id").add_argument("num_hosts", type=int, nargs="?", default=3)
    command("down", down, "end a lab and all that runs in it").add_argument("--all", action="store_true", help="end every lab")
    command("status", status, "list labs, hosts and what runs on them")
    command("add", lambda args: print(_lab(args).add_host()), "add a host; prints its name")
    command("shape", lambda args: _lab(args).shape(args.host, args.rate), "limit a host's link, as in: shape node2 200mbit", "host", "rate")
    command("unshape", lambda args: _lab(args).unshape(args.host), "undo shape", "host")
    command("cut", lambda args: _lab(args).cut(args.host), "drop all packets from and to a host", "host")
    command("heal", lambda args: _lab(args).heal(args.host), "undo cut", "host")
    execute = command("exec", execute_on, "run a program on a host, as in: exec node1 ssh node2 hostname", "host")
    execute.add_argument("program")
    execute.add_argument("arguments", nargs=argparse.REMAINDER)
    slurm = command("slurm", slurm_on, "start or stop Slurm on the lab's hosts; then: exec node1 srun -N2 hostname")
    slurm.add_argument("what", choices=("up", "down"))
    return parser


def up(args: argparse.Namespace) -> None:
    lab = Lab.up(args.num_hosts, keep=True)
    print(lab.id)
    print(f"{' '.join(lab.hosts)} are up; try: scripts/lab.sh exec node1 ssh node{args.num_hosts} hostname", file=sys.stderr)


def down(args: argparse.Namespace) -> None:
    for lab in labs() if args.all else [_lab(args)]:
        lab.down()


def status(args: argparse.Namespace) -> None:
    up_now = labs()
    if not up_now:
        print("no lab is up")
    for lab in up_now:
        print(f"lab {lab.id}")
        for host in lab.hosts:
            print(f"  {host:8} {lab.address(host):12} {len(lab.processes(host))} processes")


def execute_on(args: argparse.Namespace) -> int:
    process = _lab(args).popen(args.host, [args.program, *args.arguments])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the program too, which decides
    returncode = process.wait()
    return 128 - returncode if returncode < 0 else returncode  # as a shell puts a death by signal


def slurm_on(args: argparse.Namespace) -> None:
    from slurmlab import Slurm

    slurm = Slurm(_lab(args))
    if args.what == "up":
        slurm.up()
    else:
        slurm.down()


def _lab(args: argparse.Namespace) -> Lab:
    """The lab that ``--lab`` names, or the only one that is up."""
    if args.lab:
        return Lab.attach(args.lab)
    up_now = labs()
    if not up_now:
        raise LabError("no lab is up; scripts/lab.sh up 3 starts one")
    if len(up_now) > 1:
        raise LabError(f"--lab ID says which: up are {', '.join(lab.id for lab in up_now)}")
    return up_now[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
