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
from horoyolo.launch.command import build_command, launcher_folder
from horoyolo.launch.environment import job_env, launcher_env
from horoyolo.launch.hosts import Host, local_hosts, parse_host_list, read_hostfile, slurm_hosts, take_slots
from horoyolo.launch.interface import interface_to
from horoyolo.launch.job import Job, all_local
from horoyolo.launch.remote import Ssh
from horoyolo.launch.run import new_status_dir, run_job
from horoyolo.launch.status import STATUS_DIR


def chosen_hosts(parsed: argparse.Namespace, env: Mapping[str, str]) -> list[Host]:
    """The hosts that the flags of ``launch`` name, with the slots that its workers take (InputError: none, too few, unreadable)."""
    if parsed.num_proc is not None and parsed.num_proc < 1:
        raise InputError(f"-np {parsed.num_proc}; at least 1 is wanted")
    if parsed.hostfile:
        hosts = read_hostfile(parsed.hostfile)
    elif parsed.hosts:
        hosts = parse_host_list(parsed.hosts)
    elif parsed.slurm:
        hosts = slurm_hosts(env)
    else:
        hosts = local_hosts(parsed.num_proc or 1)
    return take_slots(hosts, parsed.num_proc or sum(host.slots for host in hosts))


def build_job(parsed: argparse.Namespace, words: Sequence[str], hosts: Sequence[Host], env: Mapping[str, str]) -> Job:
    """The job that the flags of ``launch`` mean: ``words`` on each slot of ``hosts``, in this folder, with what may travel of ``env``."""
    nic = parsed.nic or ("" if all_local(hosts) else interface_to(hosts))
    return Job(
        num_workers=sum(host.slots for host in hosts),
        argv=(sys.executable, "-m", "horoyolo", *words),
        env=job_env(hosts, len(os.sched_getaffinity(0)), env, parsed.variables),
        transport=parsed.transport,
        nic=nic,
        ssh=Ssh(parsed.ssh_port, parsed.ssh_identity),
        cwd=str(Path.cwd()),
        as_root=os.geteuid() == 0,
    )


def launch(parsed: argparse.Namespace, words: Sequence[str], hosts: Sequence[Host]) -> int:
    """Prints, writes or runs the job and gives the exit status. Raises InputError, and LaunchError when a host can't be used."""
    launcher = parsed.launcher or "horovodrun"
    job = build_job(parsed, words, hosts, os.environ)
    job = replace(job, env={**job.env, STATUS_DIR: str(new_status_dir())})
    if parsed.dry_run:
        print("\n".join(dry_run(job, hosts, launcher, os.environ)))
        return 0
    return run_job(job, hosts, launcher)


def dry_run(job: Job, hosts: Sequence[Host], launcher: str, env: Mapping[str, str]) -> list[str]:
    """What would run, as lines for a shell: folder, environment, and the words of the launcher by themselves in the last line."""
    folder = launcher_folder(hosts, launcher)
    whole = launcher_env(job, hosts, launcher, env)
    # On this machine alone the launcher inherits everything: only what differs is told.
    told = {name: value for name, value in whole.items() if not all_local(hosts) or env.get(name) != value}
    environment = ["env", *([] if all_local(hosts) else ["-i"]), *(f"{name}={value}" for name, value in sorted(told.items()))]
    return [*([f"cd {folder}"] if folder else []), f"{shlex.join(environment)} \\", shlex.join(build_command(job, hosts, launcher))]
