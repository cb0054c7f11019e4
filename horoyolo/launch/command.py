"""A job and its hosts become the command line that starts it: pure functions, so that a dry run can print exactly what would run.

Launchers paste some of their words into shells without quotes, of this machine and of the others:

- Horovod's ``gloo_run`` the working directory (``cd DIR`` behind ssh), names of variables, the interface; ``util/remote`` host, port and
  key file; ``driver_service``, which looks for interfaces, the path of Python, and with it the key of the job's messages;
- Horovod's ``mpi_run`` hosts, interfaces, names of variables, ssh's words, and whatever ``--mpi-args`` holds;
- Open MPI the values of its settings (MCA parameters, so also ``OMPI_MCA_...`` and ssh's words), behind ssh.

So hosts, interface, key file and settings must be plain words, the interface is always given, horovodrun starts in ``/`` and its workers
enter their folder by themselves (``env -C``). What workers run and the values of variables may hold anything: launchers quote these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from horoyolo.config import InputError
from horoyolo.launch.environment import NAME, threads_per_worker, worker_env
from horoyolo.launch.hosts import Host, is_address_6, render_host_list, take_slots
from horoyolo.launch.job import Job, all_local, ssh_of
from horoyolo.launch.remote import ssh_options

__all__ = ["LAUNCHERS", "Job", "build_command", "direct_command", "launcher_folder", "threads_per_worker", "worker_env"]

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./^-]+")  # means itself in every shell
INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,14}")
NO_ROUTE = "lo,docker0"  # of the same address on every host, or of one that leads nowhere
MANY_HOSTS = 64  # from here on Open MPI's daemons would start each other, by ssh between all of them


def build_command(job: Job, hosts: Sequence[Host], launcher: str) -> list[str]:
    """The words that start a job: of its launcher, or of the worker itself where there is one, here.

    Workers fill the hosts' slots one host after the other. Raises InputError when the launcher is not known, the slots don't suffice, or
    the launcher can't be told something safely.
    """
    if launcher not in LAUNCHERS:
        raise InputError(f"unknown launcher {launcher!r} (--launcher): known are {', '.join(LAUNCHERS)}")
    hosts = take_slots(hosts, job.num_workers)
    if job.num_workers == 1 and all_local(hosts):
        return direct_command(job, hosts)
    check_words(job, hosts, launcher)
    return LAUNCHERS[launcher](job, hosts)


def launcher_folder(hosts: Sequence[Host], launcher: str) -> str | None:
    """Where the launcher's process must be started; None where it is the user's own folder."""
    return "/" if launcher == "horovodrun" and not all_local(hosts) else None


def direct_command(job: Job, hosts: Sequence[Host]) -> list[str]:
    """The one worker itself: no launcher, no Horovod."""
    return list(job.argv)


def horovodrun_command(job: Job, hosts: Sequence[Host]) -> list[str]:
    """Workers over Gloo, which needs nothing installed besides Horovod, or over MPI. horovodrun hands its own environment on to them.

    Hosts go by ``-H``: its reader of hostfiles fails on comments and blank lines. Its notes on hosts that were fine within the last hour
    (``~/.horovod``) are not used: they may be wrong by now.
    """
    where = ["horovodrun", "-np", str(job.num_workers), "-H", render_host_list(hosts), f"--{job.transport}"]
    if all_local(hosts):
        # The only one that it takes then; untold it would pick any that has the address 127.0.0.1.
        return [*where, "--network-interfaces", "lo", *job.argv]
    ssh = ssh_of(job, hosts)
    port = ["-p", str(ssh.port)] if ssh.port else []
    identity = ["-i", ssh.identity] if ssh.identity else []
    # Over MPI the daemons of Open MPI take any interface unless they are told as well.
    daemons = [f"--mpi-args=-mca oob_tcp_if_include {job.nic}"] if job.transport == "mpi" else []
    return [*where, "--network-interfaces", job.nic, *daemons, *port, *identity, "--disable-cache", *_entering(job), *job.argv]


def mpirun_command(job: Job, hosts: Sequence[Host]) -> list[str]:
    """Workers over Open MPI (docs/mpi.rst of Horovod): unbound, since it would otherwise give each worker one core for all its threads;
    plain TCP for its own messages, since its RDMA is known to crash with NCCL's."""
    root = ["--allow-run-as-root"] if job.as_root else []
    return [
        *("mpirun", *root, "-np", str(job.num_workers), "-H", render_host_list(hosts)),
        *("-bind-to", "none", "-map-by", "slot", "-mca", "pml", "ob1", "-mca", "btl", "^openib"),
        *([] if all_local(hosts) else _mpirun_between_hosts(job, hosts)),
        *(word for name in sorted(job.env) for word in ("-x", name)),
        *job.argv,
    ]


def hydra_command(job: Job, hosts: Sequence[Host]) -> list[str]:
    """Workers over MPICH or Intel MPI, by the launcher that both have; what each takes for ssh's options is in the environment.

    Where hosts have different slots it is told as MPICH takes it; Intel MPI wants the same slots on all hosts, or a machine file.
    """
    interface = ["-iface", job.nic] if job.nic and not all_local(hosts) else []
    folder = ["-wdir", job.cwd] if job.cwd and not all_local(hosts) else []
    if len({host.slots for host in hosts}) == 1:
        placed = ["-hosts", ",".join(host.name for host in hosts), "-ppn", str(hosts[0].slots)]
    else:
        placed = ["-hosts", render_host_list(hosts)]
    return [
        *("mpiexec.hydra", "-bootstrap", "ssh", *interface, *placed, "-n", str(job.num_workers), *folder),
        *("-genvlist", ",".join(sorted(job.env)), "-genv", "I_MPI_PIN", "0"),  # Intel MPI would bind each worker to a share of the cores
        *job.argv,
    ]


LAUNCHERS: dict[str, Callable[[Job, Sequence[Host]], list[str]]] = {
    "horovodrun": horovodrun_command,
    "mpirun": mpirun_command,
    "hydra": hydra_command,
}


def check_words(job: Job, hosts: Sequence[Host], launcher: str) -> None:
    """Raises InputError for what a launcher can't be told, or not without a shell taking it for something else."""
    ssh_of(job, hosts)
    for host in hosts:
        if is_address_6(host.name) and not all_local(hosts):
            raise InputError(f"{launcher} takes no IPv6 address ({host.name}): give the host a name in DNS or /etc/hosts")
        if host.name == "localhost" and len(hosts) > 1:
            raise InputError("localhost among other hosts: the name by which the others reach this machine is wanted")
    if job.transport not in ("gloo", "mpi"):
        raise InputError(f"unknown transport {job.transport!r} (--transport): known are gloo, mpi")
    if job.nic and not INTERFACE.fullmatch(job.nic):
        raise InputError(f"{job.nic!r} is no interface (--nic): one name such as eth0 is wanted")
    if launcher == "horovodrun" and not job.nic and not all_local(hosts):
        raise InputError("horovodrun between hosts needs --nic: the name of the interface by which they reach each other, such as eth0")
    if job.ssh.identity and not PLAIN.fullmatch(job.ssh.identity):
        raise InputError(f"{launcher} can't be told the key file {job.ssh.identity!r} safely: name it in ~/.ssh/config (IdentityFile)")
    by_mpi = launcher == "mpirun" or (launcher == "horovodrun" and job.transport == "mpi")
    for name, value in job.env.items():
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} in the environment of the workers: letters, digits and '_' make a name")
        if by_mpi and name.startswith("OMPI_MCA_") and not PLAIN.fullmatch(value):
            raise InputError(f"{name}={value!r}: Open MPI hands it to the other hosts' shells, where letters, digits and @%+=:,./^_- are safe")
    if ":" in job.argv and (launcher != "horovodrun" or job.transport == "mpi"):
        raise InputError("':' as a word of its own in the job: mpirun would take what follows for another program")
    if "=" in job.argv[0]:
        raise InputError(f"{job.argv[0]!r} can't be run by a launcher: its path would be taken for a variable because of the '='")


def _entering(job: Job) -> list[str]:
    """Enter the job's folder, and take variables that horovodrun would hold back or replace by its own."""
    lost = [f"{name}={value}" for name, value in sorted(job.env.items()) if name == "NCCL_SOCKET_IFNAME" or "CUDA_VISIBLE_DEVICES" in name]
    words = [*(["-C", job.cwd] if job.cwd else []), *lost]
    return ["env", *words] if words else []


def _mpirun_between_hosts(job: Job, hosts: Sequence[Host]) -> list[str]:
    many = ["-mca", "plm_rsh_no_tree_spawn", "true", "-mca", "plm_rsh_num_concurrent", str(len(hosts))] if len(hosts) >= MANY_HOSTS else []
    nccl = [] if "NCCL_SOCKET_IFNAME" in job.env else ["-x", f"NCCL_SOCKET_IFNAME={job.nic or '^' + NO_ROUTE}"]
    folder = ["-wdir", job.cwd] if job.cwd else []
    interfaces = [*_interfaces(job, "btl"), *_interfaces(job, "oob")]
    return ["-mca", "plm_rsh_args", " ".join(ssh_options(ssh_of(job, hosts))), *many, *interfaces, *nccl, *folder]


def _interfaces(job: Job, part: str) -> list[str]:
    """By which interfaces a part of Open MPI talks: the job's, unless the environment says which others not to use.

    It takes a list of interfaces or one of exceptions, and crashes where it is told both.
    """
    kind, names = ("include", job.nic) if job.nic else ("exclude", NO_ROUTE)
    said = {word for word in ("include", "exclude") if f"OMPI_MCA_{part}_tcp_if_{word}" in job.env}
    return ["-mca", f"{part}_tcp_if_{kind}", names] if said <= ({"include"} if job.nic else set()) else []
