"""The start of a job as a commented script that runs by itself."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from horoyolo.launch.command import build_command, launcher_folder
from horoyolo.launch.environment import ALLOCATION, KEPT, KEPT_BY_MPI, added_env
from horoyolo.launch.hosts import Host, render_host_list, take_slots
from horoyolo.launch.job import Job, all_local

# What each flag is for, and how many words follow it.
FLAGS: dict[str, tuple[int, str]] = {
    "-np": (1, "workers"),
    "-n": (1, "workers"),
    "-H": (1, "how many of them each host takes"),
    "-hosts": (1, "where they run; each host is filled before the next"),
    "-ppn": (1, "how many of them each host takes"),
    "--gloo": (0, "how workers talk: Gloo, over TCP"),
    "--mpi": (0, "how workers talk: MPI"),
    "--network-interfaces": (1, "by which interface; it has the same name on all hosts"),
    "--disable-cache": (0, "check the hosts anew; what horovodrun noted in the last hour may be wrong by now"),
    "-p": (1, "port of ssh"),
    "-i": (1, "key of ssh"),
    "--allow-run-as-root": (0, "Open MPI wants to be told"),
    "-bind-to": (1, "a worker has several threads: don't bind it to one core"),
    "-map-by": (1, "fill one host after the other"),
    "-wdir": (1, "where workers run"),
    "-C": (1, "where workers run"),
    "-x": (1, "variables that workers on other hosts get, and no others"),
    "-genvlist": (1, "variables that workers get, and no others"),
    "-genv": (2, "Intel MPI would bind each worker to a share of the cores"),
    "-bootstrap": (1, "log in to the hosts by ssh"),
    "-iface": (1, "by which interface they talk; it has the same name on all hosts"),
    "env": (0, "what horovodrun would not hand on as it is"),
}
SETTINGS = {
    "pml": "MPI's own messages over TCP: its InfiniBand transports are known to crash beside NCCL's",
    "btl": "MPI's own messages over TCP: its InfiniBand transports are known to crash beside NCCL's",
    "plm_rsh_args": "log in without questions, and notice a dead host within seconds",
    "plm_rsh_no_tree_spawn": "log in to every host from here",
    "plm_rsh_num_concurrent": "log in to every host from here",
    "btl_tcp_if_include": "by which interface they talk; it has the same name on all hosts",
    "oob_tcp_if_include": "by which interface they talk; it has the same name on all hosts",
    "btl_tcp_if_exclude": "no interface that has the same address on every host, or leads nowhere",
    "oob_tcp_if_exclude": "no interface that has the same address on every host, or leads nowhere",
}
VARIABLES = {
    "OMP_NUM_THREADS": "cores of a host shared among its workers",
    "HOROVOD_FUSION_THRESHOLD": "gradients come in large buckets already: fusing them would be one copy more",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "how long workers wait for the one that starts last",
    "MALLOC_ARENA_MAX": "keep freed memory instead of getting it anew from the kernel at each step",
    "OMPI_MCA_mpi_yield_when_idle": "a worker that waits gives its core to those that compute",
    "PATH": "programs of the same Python first, and before them an ssh that notices dead hosts",
}


def render_script(job: Job, hosts: Sequence[Host], launcher: str, environ: Mapping[str, str]) -> str:
    """A bash script that does what ``launch`` does, by exactly the words of the dry run. Raises InputError as build_command does."""
    argv = build_command(job, hosts, launcher)
    hosts = take_slots(hosts, job.num_workers)
    local = all_local(hosts)
    by = f", by {launcher}" if tuple(argv) != job.argv else ""  # one worker here is started by itself
    folder = launcher_folder(hosts, launcher)
    lines = [
        "#!/usr/bin/env bash",
        f"# {_counted(job.num_workers, 'worker')} on {_counted(len(hosts), 'host')}, {render_host_list(hosts)}{by}.",
        "# Written by `horoyolo launch --script`; runs by itself. `horoyolo launch` does the same, and besides passes on signals, returns the",
        "# workers' own exit status (horovodrun and mpirun have but one for every failure) and leaves no worker behind.",
        "set -euo pipefail",
        "",
    ]
    if folder:
        lines += ["# horovodrun has the other hosts enter the folder it is started in, by a shell, unquoted: / needs no quotes.", f"cd {folder}", ""]
    elif job.cwd:
        lines += [f"cd {shlex.quote(job.cwd)}", ""]
    lines += ["environment=(", *_environment_lines(added_env(job, hosts, launcher, environ)), ")"]
    if not local:
        lines += [
            "# horovodrun shows all of its environment on ssh's command line; of this shell's it gets no more than ssh needs."
            if launcher == "horovodrun"
            else "# What the launcher itself needs of this shell's environment; workers get none of it from other hosts.",
            f"for name in {_kept_names(launcher)}; do",
            '    [ -z "${!name+set}" ] || environment+=("$name=${!name}")',
            "done",
        ]
    lines += ["", "command=(", *_command_lines(argv, job), ")", ""]
    lines += [f'exec env{"" if local else " -i"} "${{environment[@]}}" "${{command[@]}}"', ""]
    return "\n".join(lines)


def _kept_names(launcher: str) -> str:
    return " ".join(KEPT) if launcher == "horovodrun" else f'{" ".join(KEPT_BY_MPI)} "${{!{ALLOCATION}@}}"'


def _environment_lines(env: Mapping[str, str]) -> Iterator[str]:
    for name, value in sorted(env.items()):
        if name in VARIABLES:
            yield f"    # {VARIABLES[name]}"
        yield f"    {shlex.quote(f'{name}={value}')}"


def _command_lines(argv: Sequence[str], job: Job) -> Iterator[str]:
    """The launcher's words, flag by flag with what each is for, then the worker's."""
    split = len(argv) - len(job.argv)
    words = iter(argv[:split])
    last = ""
    for word in words:
        count, comment = FLAGS.get(word, (0, ""))
        following = list(itertools.islice(words, 2 if word == "-mca" else count))
        if word == "-mca":
            comment = SETTINGS.get(following[0], "")
        if comment and comment != last:
            yield f"    # {comment}"
        last = comment
        yield f"    {shlex.join([word, *following])}"
    if split:
        yield "    # what each of them runs"
    for group in _flag_by_flag(argv[split:]):
        yield f"    {shlex.join(group)}"


def _flag_by_flag(words: Iterable[str]) -> Iterator[list[str]]:
    """Words in groups: the program up to its first flag, then each flag with its values."""
    group: list[str] = []
    for word in words:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    yield group


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
