"""A job and its hosts become the command line that starts it: pure functions, so that a dry run can print exactly what would run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from horoyolo.launch.hosts import Host

# Left to itself, glibc hands large blocks back to the kernel at once and gets them again, zeroed page by page, a moment later: activations every
# step, Gloo's buffers every exchange. Kept, a CPU step of YOLOv5s with an exchange took 0 page faults instead of 14,000, and a tenth less time.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Job:
    """Some workers that all run the same command."""

    num_workers: int
    argv: tuple[str, ...]  # what each worker runs
    env: Mapping[str, str] = field(default_factory=dict)  # added to the environment of this process
    as_root: bool = False  # Open MPI wants to be told


def threads_per_worker(num_workers: int, num_cores: int) -> int:
    """Cores of this machine for each of its workers, at least one."""
    return max(1, num_cores // num_workers)


def worker_env(num_workers: int, num_cores: int, user_env: Mapping[str, str]) -> dict[str, str]:
    """What workers need in their environment besides the user's own, which wins.

    Without a thread count each worker would take every core, and all of them would get in each other's way.
    """
    env = {"OMP_NUM_THREADS": str(threads_per_worker(num_workers, num_cores)), "HOROVOD_FUSION_THRESHOLD": "0", **KEEP_MEMORY}
    return {name: value for name, value in env.items() if name not in user_env}


def direct_command(job: Job, hosts: Sequence[Host]) -> list[str]:
    """The one worker itself: no launcher, no Horovod."""
    return list(job.argv)


def horovodrun_command(job: Job, hosts: Sequence[Host]) -> list[str]:
    """Workers over Gloo, which needs nothing installed besides Horovod. horovodrun hands its own environment on to them."""
    return ["horovodrun", "-np", str(job.num_workers), "-H", _host_list(hosts), "--gloo", *_local_interface(hosts), *job.argv]


def mpirun_command(job: Job, hosts: Sequence[Host]) -> list[str]:
    """Workers over Open MPI (docs/mpi.rst of Horovod): unbound, since it would otherwise give each worker one core for all its threads."""
    root = ["--allow-run-as-root"] if job.as_root else []
    exported = [word for name in sorted(job.env) for word in ("-x", name)]
    return [
        *("mpirun", *root, "-np", str(job.num_workers), "-H", _host_list(hosts)),
        *("-bind-to", "none", "-map-by", "slot", "-mca", "pml", "ob1", "-mca", "btl", "^openib"),
        *(*exported, *job.argv),
    ]


LAUNCHERS: dict[str, Callable[[Job, Sequence[Host]], list[str]]] = {
    "horovodrun": horovodrun_command,
    "mpirun": mpirun_command,
}


def _host_list(hosts: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def _local_interface(hosts: Sequence[Host]) -> list[str]:
    """Loopback where all workers are here: horovodrun would pick any interface, and not the same one each time."""
    return ["--network-interfaces", "lo"] if all(host.name == "localhost" for host in hosts) else []
