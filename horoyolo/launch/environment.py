"""Which variables reach the workers, and what the launcher's own process finds in its environment.

horovodrun writes its whole environment on ssh's command line, where every user of every host can read it. So variables travel by an
allow-list, nothing that may be a secret travels at all, and the launcher of a job on other machines starts with the allowed ones alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from horoyolo.config import InputError
from horoyolo.launch.hosts import Host, expand_counts
from horoyolo.launch.job import Job, all_local, ssh_of
from horoyolo.launch.remote import ssh_options

# What programs, libraries and their tuning need. HOME and TMPDIR are each machine's own; so are the devices that it shows (CUDA_VISIBLE_DEVICES).
NAMES = (
    *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "LANG", "LANGUAGE", "TZ", "TERM"),
    *("OPAL_PREFIX", "PMIX_INSTALL_PREFIX"),  # where an Open MPI that was moved is
    *("NO_COLOR", "NO_ALBUMENTATIONS_UPDATE"),
    *("NCCL_IB_PKEY", "UCX_IB_PKEY"),  # numbers of InfiniBand partitions: no secrets, whatever they are called
)
PREFIXES = (
    *("PYTHON", "LC_", "OMP_", "GOMP_", "MKL_", "KMP_", "OPENBLAS_", "MALLOC_", "TORCH_", "PYTORCH_", "HOROYOLO_"),
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "HOROVOD_", "GLOO_", "OMPI_MCA_", "PMIX_MCA_", "UCX_", "FI_", "MPICH_", "I_MPI_"),
)
FOR_PYTHON = ("LD_LIBRARY_PATH", "PYTHONPATH")  # without which it may not start there, or not find this package
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASS|PWD|CREDENTIAL|AUTH")
# Devices are numbered by each machine; the rest is told by this launcher, not by one around it. (The MPI Operator sets words for ssh, with a blank.)
OWN = re.compile(
    r"CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|HOROVOD_(RANK|SIZE|(LOCAL|CROSS)_(RANK|SIZE)|HOSTNAME|ELASTIC)"
    r"|HOROVOD_GLOO_(RENDEZVOUS_.*|IFACE)|HOROYOLO_(STATUS_DIR|ELASTIC_FD|SLOTS?|MEMORY|TOO_FEW)|OMPI_MCA_plm_rsh_args"
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# What the launcher's own process needs of its user: ssh's agent, and Open MPI's settings and allocation; that one tells no more than it is told.
KEPT = ("SSH_AUTH_SOCK",)
KEPT_BY_MPI = (*KEPT, "HOME", "USER", "LOGNAME", "TMPDIR")
ALLOCATION = "SLURM_"
# Inside LSF Horovod would ask the tools of one machine, Summit, for the hosts.
MISLEADING = ("LSB_JOBID",)

SSH_WRAPPER = Path(__file__).parent / "bin"

# For workers that srun starts, what mpirun's flags say: MPI's own messages over TCP, since its InfiniBand ones are known to crash beside NCCL's.
OPEN_MPI = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "^openib"}

# A worker that waits gives its core away: MPI's threads and those that compute share the cores. (Steps of YOLOv5s over mpirun: 0.80 s, not 0.87.)
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}

# Left to itself, glibc hands large blocks back to the kernel at once and gets them again, zeroed page by page, a moment later: activations every
# step, Gloo's buffers every exchange. Kept, a CPU step of YOLOv5s with an exchange took 0 page faults instead of 14,000, and a tenth less time.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
GLOO_TIMEOUT_S = 120  # by default 30: less than an import of torch may take from a busy file server, and whoever waits for it then aborts


def python_words(env: Mapping[str, str]) -> list[str]:
    """The words for ``env`` that let the Python of a login by ssh start as it did in ``env``, such as that of an environment module."""
    return [f"{name}={env[name]}" for name in FOR_PYTHON if name in env]


def travelling_env(env: Mapping[str, str], named: Sequence[str] = ()) -> dict[str, str]:
    """The variables of ``env`` that workers on any machine get: those of the allow-list, and those ``named`` by the user (``-x NAME``).

    Raises InputError for a named one that is not set, is no name, or may be a secret.
    """
    for name in named:
        if not NAME.fullmatch(name):
            raise InputError(f"-x {name!r}: the name of a variable is wanted")
        if is_secret(name):
            raise InputError(f"-x {name}: it may be a secret, and other users can read it on command lines; put it into a file")
        if name not in env:
            raise InputError(f"-x {name}: it is not set here")
    return {name: env[name] for name in sorted(env) if name in named or travels(name)}


def travels(name: str) -> bool:
    """Whether a variable is on the allow-list."""
    tuning = name.startswith(PREFIXES) and NAME.fullmatch(name) and not OWN.fullmatch(name) and not is_secret(name)
    return name in NAMES or bool(tuning)


def is_secret(name: str) -> bool:
    """Whether a variable's name is one of those that secrets have."""
    return bool(SECRET.search(name.upper()))


def threads_per_worker(num_workers: int, num_cores: int) -> int:
    """Cores of a machine for each of its workers, at least one."""
    return max(1, num_cores // num_workers)


def worker_env(num_workers: int, num_cores: int | None, user_env: Mapping[str, str]) -> dict[str, str]:
    """What workers need in their environment besides the user's own, which wins.

    ``num_workers`` share ``num_cores``, those of one machine: without a thread count each worker would take every core, and all of them
    would get in each other's way. None leaves the count to the workers (``threads_here``): the cores of other machines are not known here.
    """
    threads = {"OMP_NUM_THREADS": str(threads_per_worker(num_workers, num_cores))} if num_cores else {}
    env = {**threads, "HOROVOD_FUSION_THRESHOLD": "0", "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT_S), **YIELD, **KEEP_MEMORY}
    return {name: value for name, value in env.items() if name not in user_env}


def job_env(hosts: Sequence[Host], num_cores: int, user_env: Mapping[str, str], named: Sequence[str] = ()) -> dict[str, str]:
    """The variables of a job's workers, ``Job.env``; ``num_cores`` are those of this machine, whose workers have the user's variables anyway.

    Raises InputError as ``travelling_env`` does.
    """
    travelling = travelling_env(user_env, named)
    local = all_local(hosts)
    most = max(host.slots for host in hosts)
    return {**({} if local else travelling), **worker_env(most, num_cores if local else None, user_env)}


def nccl_env(nic: str) -> dict[str, str]:
    """What tells NCCL of the interface that the user gave, if any."""
    return {"NCCL_SOCKET_IFNAME": nic} if nic else {}


def threads_here(env: Mapping[str, str], num_cores: int) -> int:
    """Threads for the worker that runs in ``env`` on a machine with ``num_cores``: its share among the workers there, by what launchers say."""
    if env.get("SLURM_STEP_NUM_TASKS") and env.get("SLURM_CPUS_PER_TASK"):
        return int(env["SLURM_CPUS_PER_TASK"])
    for name in ("HOROYOLO_SLOTS", "HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if env.get(name):
            return threads_per_worker(int(env[name]), num_cores)
    if env.get("SLURM_STEP_TASKS_PER_NODE"):
        return threads_per_worker(expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])[int(env.get("SLURM_NODEID", "0"))], num_cores)
    return num_cores


def launcher_env(job: Job, hosts: Sequence[Host], launcher: str = "horovodrun", environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of the launcher's process: that of here (or ``environ``) where all workers are here, else little but the job's.

    Programs of this Python come first on its PATH, and before them, where there are other machines, an ssh that notices dead ones. srun
    gets everything: it hands that on by messages of its own.
    """
    here = os.environ if environ is None else environ
    whole = all_local(hosts) or launcher == "slurm"
    env = {name: value for name, value in here.items() if name not in MISLEADING} if whole else kept_env(here, launcher)
    return {**env, **added_env(job, hosts, launcher, here)}


def kept_env(environ: Mapping[str, str], launcher: str) -> dict[str, str]:
    """What the launcher of a job on other machines finds of the environment it was started in."""
    if launcher == "horovodrun":  # hands all of it on
        return {name: environ[name] for name in KEPT if name in environ}
    return {name: value for name, value in environ.items() if name in KEPT_BY_MPI or name.startswith(ALLOCATION)}


def added_env(job: Job, hosts: Sequence[Host], launcher: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What the launcher finds besides: the job's variables, a PATH, and what it reads itself."""
    env = dict(job.env)
    by_ssh = launcher != "slurm" and not all_local(hosts)
    if launcher == "slurm":
        settings = dict(OPEN_MPI)
        if job.nic and "OMPI_MCA_btl_tcp_if_exclude" not in environ:  # it takes one of the two
            settings["OMPI_MCA_btl_tcp_if_include"] = job.nic
        env = {**{name: value for name, value in settings.items() if name not in environ}, **env}
    if launcher == "hydra" and by_ssh:
        # Where MPICH, then Intel MPI, look for more words for ssh; they have no flag in common.
        extra = " ".join(ssh_options(ssh_of(job, hosts)))
        env |= {"HYDRA_LAUNCHER_EXTRA_ARGS": extra, "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS": extra}
    first = [*([str(SSH_WRAPPER)] if by_ssh else []), str(Path(sys.executable).parent)]
    rest = (env.get("PATH") or environ.get("PATH", os.defpath)).split(os.pathsep)
    env["PATH"] = os.pathsep.join([*first, *(folder for folder in rest if folder not in first)])
    return env
