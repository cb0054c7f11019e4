"""What a job is: some workers that all run the same command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from horoyolo.config import InputError
from horoyolo.launch.hosts import Host
from horoyolo.launch.remote import Ssh, is_this_machine


@dataclass(frozen=True)
class Job:
    """Some workers that all run the same command."""

    num_workers: int
    argv: tuple[str, ...]  # what each worker runs
    env: Mapping[str, str] = field(default_factory=dict)  # every variable that workers get, besides those of their own machine
    transport: str = "gloo"  # gloo or mpi: how the workers of horovodrun talk; those of MPI's own launchers use MPI
    nic: str = ""  # the interface between the hosts, of the same name on all of them
    ssh: Ssh = field(default_factory=Ssh)
    cwd: str = ""  # where workers run on other machines; one that is started here runs where it is started
    as_root: bool = False  # Open MPI wants to be told


def all_local(hosts: Sequence[Host]) -> bool:
    """Whether the whole job is on this machine."""
    return all(is_this_machine(host.name) for host in hosts)


def ssh_of(job: Job, hosts: Sequence[Host]) -> Ssh:
    """How a launcher logs in, which it does alike for all hosts; raises InputError when the hosts' ports differ."""
    ports = {host.port or job.ssh.port for host in hosts if not is_this_machine(host.name)}
    if len(ports) > 1:
        raise InputError(f"ssh ports differ between hosts ({', '.join(sorted(map(str, ports)))}): launchers take one; put them into ~/.ssh/config")
    return Ssh(next(iter(ports), job.ssh.port), job.ssh.identity)
