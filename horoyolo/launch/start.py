"""What ``horoyolo launch`` does: its flags become hosts and a job, which is printed, written as a script, or run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from horoyolo.config import InputError
from horoyolo.files import atomic_file
from horoyolo.launch.command import launcher_folder
from horoyolo.launch.environment import job_env, launcher_env, nccl_env, travelling_env, worker_env
from horoyolo.launch.hosts import Host, local_hosts, parse_host_list, read_hostfile, slurm_hosts, take_slots
from horoyolo.launch.interface import interface_to
from horoyolo.launch.job import Job, all_local
from horoyolo.launch.remote import LaunchError, Ssh, is_loopback, is_this_machine, this_machine
from horoyolo.launch.run import job_command, new_status_dir, run_job
from horoyolo.launch.script import render_script
from horoyolo.launch.slurm import SlurmOptions, check_container, python_in, render_batch, slurm_options
from horoyolo.launch.stage import DataLayout, Stage
from horoyolo.launch.status import STATUS_DIR


def named_hosts(parsed: argparse.Namespace, env: Mapping[str, str]) -> list[Host]:
    """The hosts that the flags name, with all their slots; this machine with one where they name none (InputError: unreadable, no allocation)."""
    if parsed.hostfile:
        hosts = read_hostfile(parsed.hostfile)
    elif parsed.hosts:
        hosts = parse_host_list(parsed.hosts)
    elif parsed.slurm:
        hosts = slurm_hosts(env)
    else:
        return local_hosts(1)
    return hosts if parsed.slurm else with_one_name_here(hosts)


def with_one_name_here(hosts: Sequence[Host]) -> list[Host]:
    """The hosts with this machine, whatever it is called and however often, as one: by the first name given among others, else as localhost.

    By two names it would be taken for two machines, with two agents here. One that leads every host to itself becomes this machine's own name.
    """
    mine = [host for host in hosts if is_this_machine(host.name)]
    slots = sum(host.slots for host in mine)
    if len(mine) == len(hosts):
        return local_hosts(slots)
    if not mine:
        return list(hosts)
    first, *others = mine
    name = this_machine() if is_loopback(first.name) else first.name
    here = replace(first, name=name, slots=slots, max_slots=None if others else first.max_slots)
    return [here if host is first else host for host in hosts if host not in others]


def chosen_hosts(parsed: argparse.Namespace, env: Mapping[str, str]) -> list[Host]:
    """The hosts of a job with the slots that its workers take (InputError also when there are too few)."""
    if parsed.num_proc is not None and parsed.num_proc < 1:
        raise InputError(f"-np {parsed.num_proc}; at least 1 is wanted")
    if parsed.launcher == "slurm" and not parsed.slurm:
        raise InputError("--launcher slurm: it starts workers inside an allocation; give --slurm with it")
    if not (parsed.hostfile or parsed.hosts or parsed.slurm):
        return local_hosts(parsed.num_proc or 1)
    hosts = named_hosts(parsed, env)
    return take_slots(hosts, parsed.num_proc or sum(host.slots for host in hosts))


def chosen_ssh(parsed: argparse.Namespace) -> Ssh:
    """How the flags say to log in to hosts (InputError: by a key that is not there, or no port)."""
    identity = str(Path(parsed.ssh_identity).expanduser().absolute()) if parsed.ssh_identity else ""  # horovodrun starts in another folder
    if identity and not Path(identity).is_file():
        raise InputError(f"--ssh-identity {parsed.ssh_identity}: no such file; a private key is wanted")
    if parsed.ssh_port is not None and not 0 < parsed.ssh_port < 2**16:
        raise InputError(f"--ssh-port {parsed.ssh_port}: a number up to 65535 is wanted")
    return Ssh(parsed.ssh_port, identity)


def stage_data(layout: DataLayout, parsed: argparse.Namespace, hosts: Sequence[Host]) -> str:
    """Copies a data set to the hosts that lack it, unless this is a dry run; gives the data.yaml of the copies. LaunchError: a host has none."""
    stage = Stage(layout, parsed.stage, chosen_ssh(parsed))
    problems = [] if parsed.dry_run else stage.stage_all(hosts)
    if problems:
        raise LaunchError("; ".join(problems))
    return stage.data


def build_job(parsed: argparse.Namespace, words: Sequence[str], hosts: Sequence[Host], env: Mapping[str, str]) -> Job:
    """The job that the flags of ``launch`` mean: ``words`` on each slot of ``hosts``, in this folder, with what may travel of ``env``."""
    local = all_local(hosts)
    # srun and what it starts are told of no interface that nobody named: they find theirs by themselves.
    nic = parsed.nic or ("" if local or chosen_launcher(parsed) == "slurm" else interface_to(hosts))
    return Job(
        num_workers=sum(host.slots for host in hosts),
        argv=(sys.executable, "-m", "horoyolo", *words),
        env={**({} if local else nccl_env(parsed.nic)), **job_env(hosts, len(os.sched_getaffinity(0)), env, parsed.variables)},
        transport=parsed.transport,
        nic=nic,
        ssh=chosen_ssh(parsed),
        cwd=str(Path.cwd()),
        as_root=os.geteuid() == 0,
    )


def launch(parsed: argparse.Namespace, words: Sequence[str], hosts: Sequence[Host]) -> int:
    """Prints, writes or runs the job and gives the exit status. Raises InputError, and LaunchError when a host can't be used."""
    launcher, options = chosen_launcher(parsed), slurm_options(parsed)
    job, notes = build_job(parsed, words, hosts, os.environ), str(new_status_dir())
    check_container(options, launcher, job.cwd, notes)
    if parsed.script:
        return write_script(parsed.script, render_script(job, hosts, launcher, os.environ))
    job = replace(job, argv=(python_in(options, job.argv[0]), *job.argv[1:]), env={**job.env, STATUS_DIR: notes})
    if parsed.dry_run:
        print("\n".join(dry_run(job, hosts, launcher, options, os.environ)))
        return 0
    return run_job(job, hosts, launcher, options)


def write_batch(parsed: argparse.Namespace, words: Sequence[str], elastic: Sequence[str] = ()) -> int:
    """Writes a batch script for Slurm; the hosts are those that its allocation will have. Raises InputError for what Slurm would not take.

    ``elastic`` are the flags of ``launch`` for an elastic job.
    """
    check_batch_flags(parsed)
    options = slurm_options(parsed)
    env = {**travelling_env(os.environ, parsed.variables), **worker_env(options.workers_per_node, None, os.environ)}
    return write_script(parsed.script, render_batch(words, options, chosen_launcher(parsed), env, str(Path.cwd()), sys.executable, elastic))


def check_batch_flags(parsed: argparse.Namespace) -> None:
    """Raises InputError for flags of ``launch`` that a batch script of --slurm has no place for."""
    for flag, is_given in (
        ("-np", parsed.num_proc is not None),
        ("--stage", parsed.stage is not None),
        ("--transport", parsed.transport != "gloo"),
        ("--nic", bool(parsed.nic)),
        ("--ssh-port", parsed.ssh_port is not None),
        ("--ssh-identity", bool(parsed.ssh_identity)),
        ("--slots-per-host", parsed.slots_per_host is not None),
    ):
        if is_given:
            raise InputError(f"{flag} has no place in the script of --slurm --script; `horoyolo launch --slurm` in a script of your own takes it")


def chosen_launcher(parsed: argparse.Namespace) -> str:
    """The launcher asked for; by default horovodrun, and srun for Slurm."""
    return parsed.launcher or ("slurm" if parsed.slurm else "horovodrun")


def write_script(path: Path, text: str) -> int:
    """Writes an executable script; raises InputError when there is no place for it."""
    if not path.parent.is_dir():
        raise InputError(f"--script {path}: there is no folder {path.parent}")
    try:
        with atomic_file(path, "w") as stream:
            stream.write(text)
        path.chmod(0o755)
    except OSError as error:
        raise InputError(f"--script {path}: it can't be written: {error.strerror}; a file in a folder of yours is wanted") from error
    print(f"{path} written")
    return 0


def dry_run(job: Job, hosts: Sequence[Host], launcher: str, options: SlurmOptions, env: Mapping[str, str]) -> list[str]:
    """What would run, as lines for a shell: folder, environment, and the words of the launcher by themselves in the last line."""
    argv = job_command(job, hosts, launcher, options)
    folder = launcher_folder(hosts, launcher)
    whole = launcher_env(job, hosts, launcher, env)
    # On this machine alone the launcher inherits everything: only what differs is told.
    told = {name: value for name, value in whole.items() if not all_local(hosts) or env.get(name) != value}
    environment = ["env", *([] if all_local(hosts) else ["-i"]), *(f"{name}={value}" for name, value in sorted(told.items()))]
    return [*([f"cd {folder}"] if folder else []), f"{shlex.join(environment)} \\", shlex.join(argv)]
