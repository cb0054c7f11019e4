"""What ``horoyolo launch --min-np`` does: its flags become an elastic job, which is printed or run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from horoyolo.config import InputError
from horoyolo.elastic.channel import HANG_TIMEOUT_S
from horoyolo.elastic.coordinator import Elastic, agent_argv, run_elastic, workers_env
from horoyolo.elastic.discovery import KUBERNETES, Ask, DiscoveryError, Names, ask_hostfile, ask_program, ask_slurm, usable
from horoyolo.elastic.membership import Limits
from horoyolo.launch.environment import nccl_env, travelling_env, worker_env
from horoyolo.launch.hosts import Host, is_address_6, local_hosts, parse_host_list, slurm_hosts
from horoyolo.launch.job import Job
from horoyolo.launch.remote import is_this_machine
from horoyolo.launch.run import new_status_dir
from horoyolo.launch.slurm import ELASTIC, check_container, slurm_options
from horoyolo.launch.start import chosen_ssh, write_batch
from horoyolo.launch.status import STATUS_DIR

FILE_EVERY_S, PROGRAM_EVERY_S, SLURM_EVERY_S = 1.0, 2.0, 10.0  # Slurm's controller serves everybody


def is_elastic(parsed: argparse.Namespace) -> bool:
    """Whether the flags of ``launch`` mean an elastic job. Raises InputError for those that mean one only together with ``--min-np``."""
    if parsed.min_np is not None:
        return True
    for flag, value in (
        ("--max-np", parsed.max_np),
        ("--slots-per-host", parsed.slots_per_host),
        ("--discovery-script", parsed.discovery_script),
        ("--kubernetes", parsed.kubernetes or None),
        ("--hang-timeout", parsed.hang_timeout),
    ):
        if value is not None:
            raise InputError(f"{flag}: it belongs to an elastic job; give --min-np with it")
    return False


def build_elastic(parsed: argparse.Namespace, env: Mapping[str, str], batch: int | None = None) -> Elastic:
    """What the flags say about an elastic job. Raises InputError for what can't be, an unreadable host list included.

    Workers are at most as many as a global ``batch`` has images: one more would never have one.
    """
    check_flags(parsed)
    if parsed.script:
        raise InputError("--script: with --min-np it is a batch script for Slurm; give --slurm with it")
    ask, every_s = _source(parsed, env)
    hang_timeout_s = HANG_TIMEOUT_S if parsed.hang_timeout is None else parsed.hang_timeout
    return Elastic(Limits(parsed.min_np, parsed.max_np or batch), ask, every_s, by_srun=parsed.slurm, hang_timeout_s=hang_timeout_s)


def check_flags(parsed: argparse.Namespace) -> None:
    """Raises InputError for flags that an elastic job can't have."""
    check_container(slurm_options(parsed), ELASTIC)
    for flag, value in (("-np", parsed.num_proc), ("--launcher", parsed.launcher), ("--stage", parsed.stage)):
        if value is not None:
            raise InputError(f"{flag}: not with --min-np; its workers are started by horoyolo itself, as many as there are slots, --max-np at most")
    if parsed.transport != "gloo":
        raise InputError(f"--transport {parsed.transport}: an elastic job (--min-np) talks by gloo")
    if parsed.min_np < 1:
        raise InputError(f"--min-np {parsed.min_np}: at least 1 is wanted")
    if parsed.max_np is not None and parsed.max_np < parsed.min_np:
        raise InputError(f"--max-np {parsed.max_np} is less than --min-np {parsed.min_np}")
    if parsed.slots_per_host is not None and parsed.slots_per_host < 1:
        raise InputError(f"--slots-per-host {parsed.slots_per_host}: at least 1 is wanted")
    if parsed.hang_timeout is not None and not parsed.hang_timeout >= 3:
        raise InputError(f"--hang-timeout {parsed.hang_timeout:g}: seconds are wanted, at least 3: workers give a sign of life every second")


def _source(parsed: argparse.Namespace, env: Mapping[str, str]) -> tuple[Ask, float]:
    """What is asked for the hosts, and how often in seconds. What need not be waited for is tried at once."""
    slots = parsed.slots_per_host
    if parsed.hostfile:
        ask = ask_hostfile(parsed.hostfile, slots)
        _check_addresses(ask())
        return ask, FILE_EVERY_S
    if parsed.hosts:
        hosts = parse_host_list(parsed.hosts)
        _check_addresses(hosts)
        _check_slots("--hosts", hosts, parsed.min_np)
        return (lambda: hosts), SLURM_EVERY_S
    if parsed.slurm:
        _check_slots("--slurm", slurm_hosts(env), parsed.min_np)
        return ask_slurm(env), SLURM_EVERY_S
    if parsed.discovery_script or parsed.kubernetes:
        program = parsed.discovery_script or KUBERNETES
        if not os.access(program, os.X_OK) or not os.path.isfile(program):
            raise InputError(f"{program}: it is not there or can't be run; a program that prints HOST:SLOTS lines is wanted")
        if parsed.kubernetes and slots is None:
            raise InputError("--kubernetes: --slots-per-host is wanted with it; the MPI Operator lists pods without their slots")
        return ask_program([os.path.abspath(program)], slots), PROGRAM_EVERY_S
    here = local_hosts(parsed.max_np or parsed.min_np)
    return (lambda: here), SLURM_EVERY_S


def _check_addresses(hosts: Sequence[Host]) -> None:
    """Raises InputError for an IPv6 address: Horovod's workers look each other up by IPv4."""
    for host in hosts:
        if is_address_6(host.name) and not is_this_machine(host.name):
            raise InputError(f"an elastic job takes no IPv6 address ({host.name}): give the host a name in DNS or /etc/hosts, with an IPv4 address")


def _check_slots(flag: str, hosts: Sequence[Host], min_np: int) -> None:
    """Raises InputError where a list that does not change has too few slots, which would be waited for in vain."""
    slots = sum(host.slots for host in hosts)
    if slots < min_np:
        raise InputError(f"--min-np {min_np}, but {slots} slots on {len(hosts)} hosts ({flag}): fewer workers or more slots are wanted")


def build_elastic_job(parsed: argparse.Namespace, words: Sequence[str], env: Mapping[str, str]) -> Job:
    """The job that each slot runs: ``words`` in this folder, with what may travel of ``env``."""
    words = words if "--elastic" in words else [*words, "--elastic"]
    variables = {**nccl_env(parsed.nic), **travelling_env(env, parsed.variables), **worker_env(1, None, env), STATUS_DIR: str(new_status_dir())}
    argv = (sys.executable, "-m", "horoyolo", *words)
    return Job(parsed.min_np, argv, variables, nic=parsed.nic, ssh=chosen_ssh(parsed), cwd=str(Path.cwd()))


def launch_elastic(parsed: argparse.Namespace, words: Sequence[str], batch: int) -> int:
    """Prints the job, writes a batch script for it, or runs it, and gives the exit status. Raises InputError."""
    if parsed.slurm and parsed.script:
        check_flags(parsed)
        given = (("--min-np", parsed.min_np), ("--max-np", parsed.max_np), ("--hang-timeout", parsed.hang_timeout))
        return write_batch(parsed, words, [text for flag, value in given if value is not None for text in (flag, f"{value:g}")])
    elastic = build_elastic(parsed, os.environ, batch)
    job = build_elastic_job(parsed, words, os.environ)
    if parsed.dry_run:
        print("\n".join(dry_run(job, elastic)))
        return 0
    return run_elastic(job, elastic)


def dry_run(job: Job, elastic: Elastic) -> list[str]:
    """What would run, as lines for a shell: the agent of each host of the present list; last, what each agent starts, with its variables."""
    try:
        names, hosts = Names(), elastic.ask()
        names.learn(host.name for host in hosts)
        hosts = usable(hosts, names)
    except DiscoveryError as error:
        raise InputError(f"hosts: {error}") from error
    told = [f"{name}={value}" for name, value in sorted(workers_env(job).items())]
    agents = [f"{shlex.join(agent_argv(job, host, elastic.by_srun))}  # {host.name}: {host.slots} workers" for host in hosts]
    return [*agents, f"{shlex.join(['env', *told])} \\", shlex.join(job.argv)]
