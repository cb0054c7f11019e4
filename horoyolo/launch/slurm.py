"""A job for Slurm: batch scripts, and the srun that starts workers inside an allocation.

Options for the scheduler are plain words, since they stand in comments of the script where nothing can be quoted. All else is quoted.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from horoyolo.config import InputError
from horoyolo.launch.environment import OPEN_MPI
from horoyolo.launch.hosts import Host, take_slots
from horoyolo.launch.job import Job
from horoyolo.launch.status import STATUS_DIR, TOO_FEW

WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*")
TIME = re.compile(r"[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}")
ARRAY = re.compile(r"[0-9]+([-:,][0-9]+)*(%[0-9]+)?")
PLAIN = re.compile(r"[^\s:,]+")
ELASTIC = "elastic"
IN_ALLOCATION = ("horovodrun", "mpirun")  # launchers that `horoyolo launch --slurm` runs on the first node
SIGNAL_S = 180  # before the time limit, at most


@dataclass(frozen=True)
class SlurmOptions:
    """What a job asks Slurm for; empty fields and zeros are left to the cluster. Raises InputError for what Slurm would not take."""

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 0  # workers of a node; 0: one a GPU, or one
    cpus_per_task: int = 0
    time: str = ""  # time limit, such as 04:00:00
    partition: str = ""
    account: str = ""
    job_name: str = "horoyolo"
    array: str = ""  # tasks that are runs of their own, such as 0-4%2
    container_image: str = ""  # of enroot, by Pyxis
    apptainer: str = ""  # an image file
    container_mounts: str = ""  # SRC:DST,... besides the folder of the job

    def __post_init__(self) -> None:
        for flag, number, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--tasks-per-node", self.tasks_per_node, 0),
            ("--cpus-per-task", self.cpus_per_task, 0),
        ):
            if number < least:
                raise InputError(f"{flag} {number}: at least {least} is wanted")
        for flag, value, pattern, legal in (
            ("--time", self.time, TIME, "MINUTES, HH:MM:SS or D-HH:MM:SS"),
            ("--partition", self.partition, WORD, "a name"),
            ("--account", self.account, WORD, "a name"),
            ("--job-name", self.job_name, WORD, "a name"),
            ("--array", self.array, ARRAY, "numbers such as 0-4 or 1,3,5%2"),
        ):
            if value and not pattern.fullmatch(value):
                raise InputError(f"{flag} {value!r}: {legal} is wanted")
        if self.container_image and self.apptainer:
            raise InputError("--container-image and --apptainer: one container is wanted")

    @property
    def workers_per_node(self) -> int:
        """Workers of each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def signal_s(self) -> int:
        """How long before the time limit the job is told: three minutes, or a quarter of the limit, so that each start gets somewhere."""
        if not self.time:
            return SIGNAL_S
        days, dash, clock = self.time.rpartition("-")
        figures = [int(figure) for figure in clock.split(":")]
        # MINUTES, MINUTES:SECONDS and HOURS:MINUTES:SECONDS; behind days hours come first
        hours, minutes, seconds = [*figures, 0, 0][:3] if dash else ([0, *figures, 0] if len(figures) < 3 else figures)[:3]
        return min(SIGNAL_S, (((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds) // 4)

    @property
    def in_container(self) -> bool:
        """Whether workers run in a container."""
        return bool(self.container_image or self.apptainer)


def describe_slurm(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of SlurmOptions; left out, they are not among what was parsed."""
    group = parser.add_argument_group("Slurm", "for --slurm --script, and with --launcher slurm inside an allocation")
    for flag, metavar, text in (
        ("--nodes", "N", "machines"),
        ("--gpus-per-node", "N", "GPUs of each"),
        ("--tasks-per-node", "N", "workers of each; by default one a GPU, or one"),
        ("--cpus-per-task", "N", "cores of a worker"),
    ):
        group.add_argument(flag, type=int, default=argparse.SUPPRESS, metavar=metavar, help=text)
    for flag, metavar, text in (
        ("--time", "HH:MM:SS", "limit; a job that reaches it stops with a checkpoint, is requeued and goes on"),
        ("--partition", "NAME", ""),
        ("--account", "NAME", ""),
        ("--job-name", "NAME", "also names the run where train has no --name"),
        ("--array", "0-4", "several runs, each with a folder of its own"),
        ("--container-image", "IMAGE", "run workers in it, by Pyxis"),
        ("--apptainer", "FILE", "run workers in this image, by Apptainer"),
        ("--container-mounts", "SRC:DST,...", "what the container sees besides this folder"),
    ):
        group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)


def slurm_options(parsed: argparse.Namespace) -> SlurmOptions:
    """What the flags of ``describe_slurm`` say. Raises InputError as SlurmOptions does, and where they were given without --slurm."""
    given = {field.name: getattr(parsed, field.name) for field in fields(SlurmOptions) if hasattr(parsed, field.name)}
    if given and not parsed.slurm:
        raise InputError(f"--{next(iter(given)).replace('_', '-')}: it belongs to --slurm; give that with it, or leave it out")
    return SlurmOptions(**given)


def render_batch(
    train: Sequence[str],
    options: SlurmOptions,
    launcher: str,
    env: Mapping[str, str],
    folder: str,
    python: str = "python",
    elastic: Sequence[str] = (),
) -> str:
    """The text of a batch script for ``sbatch`` that runs ``horoyolo TRAIN...`` on all nodes, by srun, horovodrun or mpirun.

    ``train`` are the words of ``train`` itself, ``env`` the variables to set, ``folder`` where the job runs, the same on every node. The run
    is named by ``--name`` or, without it, by the job's number; in an array also by the task's. ``elastic`` are the words that make ``launch``
    an elastic job, which starts its workers itself and outlives nodes; ``launcher`` is of no meaning then. Raises InputError when the launcher
    is not known or does not go with the options.
    """
    if elastic:
        launcher = ELASTIC
    elif launcher not in ("slurm", *IN_ALLOCATION):
        raise InputError(f"unknown launcher {launcher!r} (--launcher) for a batch script: known are slurm, {', '.join(IN_ALLOCATION)}")
    check_container(options, launcher, folder)
    words, name = _without_name(train)
    num_workers = options.nodes * options.workers_per_node
    lines = [
        "#!/bin/bash",
        f"# {num_workers} worker{'s' * (num_workers > 1)} on {options.nodes} node{'s' * (options.nodes > 1)}, by {_by(launcher)}.",
        "# Written by `horoyolo launch --slurm --script`; submit it with sbatch.",
        *_directives(options, outlives_nodes=bool(elastic)),
        "set -uo pipefail",
        "",
        f"cd {shlex.quote(folder)} || exit",
        "",
        "# This job alone: of an array the number of one task is also that of all of them.",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "",
        "# The run's name. A job that is requeued keeps its number, so that it goes on with its run; each task of an array has a run of its own.",
        f"run={shlex.quote(name)}${{SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}}"
        if name
        else f"run={options.job_name}-${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}}",
        "",
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(_variables(options, launcher, env).items())),
        *(TOO_FEW_NOTE if elastic else ()),
        *(_by_srun(words, options, folder, python) if launcher == "slurm" else _by_launch(words, elastic or ["--launcher", launcher], python)),
        *(REQUEUE_TOO_FEW if elastic else ()),
        *REQUEUE,
    ]
    return "\n".join(lines)


def check_container(options: SlurmOptions, launcher: str, *folders: str) -> None:
    """Raises InputError for a container that ``launcher`` would start workers outside of, or that ``folders`` can't be shown to."""
    if options.in_container and launcher != "slurm":
        raise InputError(f"containers (--container-image, --apptainer) go with --launcher slurm: {_by(launcher)} would start workers outside of them")
    for folder in folders if options.in_container else ():
        if not PLAIN.fullmatch(folder):
            raise InputError(f"the folder {folder!r} can't be shown to a container: one without spaces, ',' and ':' is wanted")


def srun_command(job: Job, hosts: Sequence[Host], options: SlurmOptions) -> list[str]:
    """The words that start a job's workers inside an allocation by srun and PMIx, one host's slots after the other's.

    srun hands the environment of its own process on, by Slurm's own messages. A worker that fails ends the others.
    """
    hosts = take_slots(hosts, job.num_workers)
    if len({host.slots for host in hosts}) == 1:
        placed = [f"--ntasks-per-node={hosts[0].slots}", f"--nodelist={','.join(host.name for host in hosts)}"]
    else:
        placed = ["--distribution=arbitrary", "--nodelist=" + ",".join(host.name for host in hosts for _ in range(host.slots))]
    folder = [f"--chdir={job.cwd}"] if job.cwd else []
    container = _container(options, job.cwd, job.env.get(STATUS_DIR, ""))
    return [*_srun(options), f"--nodes={len(hosts)}", f"--ntasks={job.num_workers}", *placed, *folder, *container, *job.argv]


RUN = '--name "$run" --resume auto'
# A shell takes no signal while a program runs in its foreground.
WAIT = (
    "launcher=$!",
    "",
    "# A signal cuts the wait short, and then the launcher may still be running.",
    "status=",
    'while [ -z "$status" ]; do',
    "    interrupted=",
    '    wait "$launcher"',
    "    code=$?",
    '    [ -n "$interrupted" ] || status=$code',
    "done",
    "",
)
# An elastic job stops by itself when too few nodes are left, and says so: a file STOP in its run means that it is to stay stopped.
TOO_FEW_NOTE = (
    "",
    "# Here the job notes that it stopped by itself: too few nodes were left for too long. Requeued, it gets others.",
    f'export {TOO_FEW}="$PWD/.too-few-$SLURM_JOB_ID"',
    f'rm -f "${TOO_FEW}"',
)
REQUEUE_TOO_FEW = (
    f'[ -e "${TOO_FEW}" ] && [ -z "$stopped" ] && time_is_up=yes',
    f'rm -f "${TOO_FEW}"',
    "",
)
REQUEUE = (
    "# 75: stopped on request, with a checkpoint. A run that is done or failed is not started again, nor one that somebody cancelled.",
    'if [ "$status" = 75 ] && [ -n "$time_is_up" ]; then',
    '    scontrol requeue "$job"',
    "fi",
    'exit "$status"',
    "",
)


def _by(launcher: str) -> str:
    return {"slurm": "srun and PMIx", ELASTIC: "horoyolo itself, which goes on without those that die"}.get(launcher, f"{launcher} on the first node")


def _directives(options: SlurmOptions, outlives_nodes: bool) -> list[str]:
    asked = {
        "job-name": options.job_name,
        "nodes": options.nodes,
        "ntasks-per-node": options.workers_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "array": options.array,
    }
    return [
        *(f"#SBATCH --{name}={value}" for name, value in asked.items() if value),
        f"# This shell, and nothing else, gets USR1 {options.signal_s} s before the time limit; up to 60 s earlier, as Slurm finds time.",
        f"#SBATCH --signal=B:USR1@{options.signal_s}",
        *(["# A node that dies does not end the job.", "#SBATCH --no-kill"] if outlives_nodes else []),
        "# One log for all starts of the job.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.out",
    ]


def _variables(options: SlurmOptions, launcher: str, env: Mapping[str, str]) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(options.cpus_per_task)} if options.cpus_per_task else {}
    return {**threads, **(OPEN_MPI if launcher == "slurm" else {}), **env}


def _by_srun(words: Sequence[str], options: SlurmOptions, folder: str, python: str) -> list[str]:
    worker = [*_container(options, folder), python_in(options, python), "-m"]
    once = ["srun", "--nodes=1", "--ntasks=1"] if options.container_image else []
    return [
        "",
        "# Workers leave notes here, which all nodes must see: one that stops on request ends with 0, or srun would end the others at once.",
        'HOROYOLO_STATUS_DIR=$(mktemp -d "$PWD/.status-$SLURM_JOB_ID-XXXXXX") || exit',
        "export HOROYOLO_STATUS_DIR",
        "trap 'rm -rf \"$HOROYOLO_STATUS_DIR\"' EXIT",
        "",
        *_traps('scancel --signal=TERM "$job"  # to the workers, not to this shell'),
        "",
        f"{shlex.join([*_srun(options), *worker, 'horoyolo', *words])} {RUN} &",
        *WAIT,
        "# What the job came to, from the notes of all workers.",
        f'status=$({shlex.join([*once, *worker, "horoyolo.launch.status"])} "$HOROYOLO_STATUS_DIR" "$status") || status=1',
        'rm -rf "$HOROYOLO_STATUS_DIR"  # now: a requeue may kill this shell before it comes to its end',
        "",
    ]


def _by_launch(words: Sequence[str], flags: Sequence[str], python: str) -> list[str]:
    return [
        "",
        *_traps('kill -TERM "$launcher"  # it has the workers stop', tells="--min-np" in flags),
        "",
        f"{shlex.join([python, '-m', 'horoyolo', 'launch', '--slurm', *flags, '--', *words])} {RUN} &",
        *WAIT,
    ]


def _traps(stop: str, tells: bool = False) -> list[str]:
    """What signals do: ``stop``, and with ``tells`` a variable says so."""
    return [
        "time_is_up=",
        *(["stopped="] if tells else []),
        "stop() {",
        "    interrupted=yes",
        *(["    stopped=yes"] if tells else []),
        f"    {stop}",
        "}",
        "trap 'time_is_up=yes; stop' USR1",
        "# `scancel --batch --signal=TERM JOB`, or ARRAY_TASK, has it stop with a checkpoint and stay so; a plain scancel leaves it some seconds.",
        "trap stop TERM",
    ]


def _srun(options: SlurmOptions) -> list[str]:
    # Since 22.05 a step no longer takes the cores of its tasks from the job. Without a figure each task would be bound to one core.
    cores = f"--cpus-per-task={options.cpus_per_task}" if options.cpus_per_task else "--cpu-bind=none"
    return ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", cores]


def python_in(options: SlurmOptions, python: str) -> str:
    """What runs workers: an image has a Python of its own, elsewhere than this machine's."""
    return "python3" if options.in_container else python


def _container(options: SlurmOptions, folder: str, notes: str = "") -> list[str]:
    """The words between srun and what runs in its container; ``folder``, where it runs, and ``notes`` are there too."""
    mounts = ",".join([*(f"{path}:{path}" for path in (folder, notes) if path), *filter(None, [options.container_mounts])])
    if options.container_image:
        workdir = [f"--container-workdir={folder}"] if folder else []
        return [f"--container-image={options.container_image}", *([f"--container-mounts={mounts}"] if mounts else []), *workdir]
    if options.apptainer:
        gpus = ["--nv"] if options.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *(["--bind", mounts] if mounts else []), *(["--pwd", folder] if folder else []), options.apptainer]
    return []


def _without_name(train: Sequence[str]) -> tuple[list[str], str]:
    """The words without ``--name`` and ``--resume auto``, which the script adds itself, and the name."""
    words: list[str] = []
    name = ""
    given = iter(train)
    for word in given:
        flag, equals, value = word.partition("=")
        if flag == "--name":
            name = value if equals else next(given, "")
        elif flag == "--resume":
            mode = value if equals else next(given, "")
            if mode != "auto":
                raise InputError(f"--resume {mode}: a batch script that may be requeued goes on with its own run (--resume auto)")
        else:
            words.append(word)
    return words, name
