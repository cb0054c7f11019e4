from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from horoyolo.config import InputError
from horoyolo.elastic.coordinator import agent_argv
from horoyolo.launch.command import build_command
from horoyolo.launch.environment import (
    SSH_WRAPPER,
    is_secret,
    job_env,
    launcher_env,
    python_words,
    threads_here,
    threads_per_worker,
    travelling_env,
    travels,
    worker_env,
)
from horoyolo.launch.hosts import Host, local_hosts
from horoyolo.launch.job import Job
from horoyolo.launch.remote import Ssh
from horoyolo.launch.run import _agent_lines
from horoyolo.launch.session import Session, Unreachable
from horoyolo.launch.status import STATUS_DIR

TWO = [Host("198.51.100.1", 1), Host("198.51.100.2", 1)]
HOSTS = [Host("gpu1", 2), Host("gpu2", 2)]
HERE = {
    **{"PATH": "/usr/bin", "HOME": "/home/ann", "USER": "ann", "SSH_AUTH_SOCK": "/tmp/agent", "SLURM_JOB_ID": "7", "LSB_JOBID": "3", "EDITOR": "vi"},
    **{"NCCL_DEBUG": "INFO", "HOROVOD_CYCLE_TIME": "2", "OMP_NUM_THREADS": "3", "HOROYOLO_API_KEY": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret"},
    **{"CUDA_VISIBLE_DEVICES": "0", "HOROVOD_RANK": "1", "HOROVOD_SECRET_KEY": "s3cret", "WANDB_MODE": "offline", "NCCL_IB_PKEY": "1"},
}
PYTHON = str(Path(sys.executable).parent)


def test_tuning_travels_and_little_else():
    assert travelling_env(HERE) == {name: HERE[name] for name in ("PATH", "NCCL_DEBUG", "HOROVOD_CYCLE_TIME", "OMP_NUM_THREADS", "NCCL_IB_PKEY")}


@pytest.mark.parametrize("name", ["HOROVOD_HIERARCHICAL_ALLREDUCE", "HOROVOD_HIERARCHICAL_ALLGATHER", "HOROVOD_AUTOTUNE", "HOROVOD_AUTOTUNE_LOG"])
def test_horovods_own_tuning_passes_through(name):
    """There are no options of ours for it, and nothing here sets it."""
    assert travelling_env({name: "1"}) == {name: "1"}
    assert job_env(HOSTS, 8, {name: "1"})[name] == "1"
    assert name not in job_env(local_hosts(2), 8, {name: "1"})  # inherited as it is
    assert name not in worker_env(2, 8, {})


def test_python_starts_on_other_hosts_with_what_it_needs(tmp_path, monkeypatch):
    """That of an environment module finds no library of its own otherwise; what is told to ssh is looked at."""
    needs = {"LD_LIBRARY_PATH": "/opt/python/lib", "PYTHONPATH": "/checkout"}
    assert python_words(HERE) == []
    words = python_words({**HERE, **needs})
    assert words == [f"{name}={value}" for name, value in needs.items()]
    job = Job(2, ("w",), {**needs, STATUS_DIR: "/s"}, cwd="/")
    lines = [*_agent_lines(job, TWO, "mpirun")["198.51.100.1"][0], *agent_argv(job, TWO[0], by_srun=False)]
    for word in words:
        assert sum(word in line for line in lines) == 2
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    ssh.chmod(0o755)
    for name, value in {**needs, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    session = Session(TWO[0], "python", Ssh())
    with pytest.raises(Unreachable):
        session.ask("facts")
    session.close()
    assert all(word in (tmp_path / "told").read_text() for word in words)


# In the launcher's pod of an MPIJob, by the MPI Operator.
OPERATOR = {
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
    "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
    "OMPI_MCA_orte_set_default_slots": "1",
}


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_a_job_starts_with_what_the_mpi_operator_sets(launcher):
    job = Job(4, ("w",), env=job_env(HOSTS, 8, {**HERE, **OPERATOR}), nic="eth0")
    assert "OMPI_MCA_plm_rsh_args" not in job.env  # mpirun gets its own
    assert job.env["OMPI_MCA_orte_keep_fqdn_hostnames"] == "true"
    assert build_command(job, HOSTS, launcher)


def test_variables_that_the_user_names_travel_too():
    assert travelling_env(HERE, ["WANDB_MODE", "CUDA_VISIBLE_DEVICES"]).items() >= {"WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "0"}.items()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "-x AWS_SECRET_ACCESS_KEY: it may be a secret"),
        ("HOROYOLO_API_KEY", "may be a secret"),
        ("ABSENT", "-x ABSENT: it is not set here"),
        ("A=1", "-x 'A=1': the name of a variable is wanted"),
        ("A;reboot", "the name of a variable is wanted"),
        ("", "the name of a variable is wanted"),
    ],
)
def test_a_variable_that_cannot_travel_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        travelling_env({**HERE, "A;reboot": "1"}, [name])


@settings(deadline=None)
@examples(
    st.sampled_from(["HOROYOLO_", "NCCL_", "HOROVOD_", "PYTHON", "CUDA_", "OMPI_MCA_"]),
    st.sampled_from(["key", "SECRET", "Token", "PASSWORD", "passwd", "CREDENTIALS"]),
    st.from_regex(r"[A-Z_]{0,8}", fullmatch=True),
)
def test_no_secret_travels(prefix, word, rest):
    assert not travels(f"{prefix}{rest}{word}")
    assert is_secret(f"{prefix}{word}{rest}")
    assert f"{prefix}{word}" not in travelling_env({f"{prefix}{word}": "x"})


@pytest.mark.parametrize("name", ["BASH_FUNC_x%%", "NCCL_A B", "NCCL_$(x)", "NCCL_A\n"])
def test_no_name_that_means_something_to_a_shell_travels(name):
    assert not travels(name)


@pytest.mark.parametrize(("num_workers", "num_cores", "threads"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (4, 2, 1)])
def test_workers_share_the_cores(num_workers, num_cores, threads):
    assert threads_per_worker(num_workers, num_cores) == threads


def test_the_users_environment_wins():
    given = {"OMP_NUM_THREADS": "3", "HOROVOD_GLOO_TIMEOUT_SECONDS": "9"}
    assert worker_env(2, 8, {})["OMP_NUM_THREADS"] == "4"
    assert worker_env(2, 8, {})["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "120"
    assert not worker_env(2, 8, given).keys() & given.keys()


def test_a_jobs_variables():
    assert "NCCL_DEBUG" not in job_env(local_hosts(4), 8, HERE)  # workers here inherit it
    assert job_env(local_hosts(4), 8, {})["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in job_env(HOSTS, 8, {})  # other machines have other cores
    assert job_env(HOSTS, 8, HERE).items() >= {**travelling_env(HERE), "HOROVOD_FUSION_THRESHOLD": "0"}.items()


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({}, 12),
        ({"HOROVOD_LOCAL_SIZE": "4"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "6"}, 2),
        ({"MPI_LOCALNRANKS": "24"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_NODEID": "2"}, 6),
        ({"SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_CPUS_PER_TASK": "5"}, 5),
        ({"SLURM_CPUS_PER_TASK": "5", "HOROVOD_LOCAL_SIZE": "2"}, 6),  # horovodrun in a batch script
    ],
)
def test_a_worker_takes_its_share_of_the_cores(env, threads):
    assert threads_here(env, 12) == threads


def test_the_launcher_of_a_job_here_inherits_everything_but_what_misleads_horovod():
    env = launcher_env(Job(2, ("w",), env={"A": "1"}), local_hosts(2), environ=HERE)
    assert env == {**{name: value for name, value in HERE.items() if name != "LSB_JOBID"}, "A": "1", "PATH": f"{PYTHON}:/usr/bin"}


def test_horovodrun_on_other_hosts_gets_the_jobs_variables_alone():
    job = Job(4, ("w",), env={"NCCL_DEBUG": "INFO", "PATH": "/opt/bin"})
    expected = {"NCCL_DEBUG": "INFO", "PATH": f"{SSH_WRAPPER}:{PYTHON}:/opt/bin", "SSH_AUTH_SOCK": "/tmp/agent"}
    assert launcher_env(job, HOSTS, "horovodrun", HERE) == expected


def test_mpirun_on_other_hosts_keeps_what_it_needs_itself():
    env = launcher_env(Job(4, ("w",), env={"A": "1"}), HOSTS, "mpirun", HERE)
    kept = {name: HERE[name] for name in ("HOME", "USER", "SSH_AUTH_SOCK", "SLURM_JOB_ID")}
    assert env == {**kept, "A": "1", "PATH": f"{SSH_WRAPPER}:{PYTHON}:/usr/bin"}


def test_srun_gets_everything():
    env = launcher_env(Job(4, ("w",), env={"A": "1"}), HOSTS, "slurm", HERE)
    here = {name: value for name, value in HERE.items() if name != "LSB_JOBID"}
    assert env == {**here, "A": "1", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "^openib", "PATH": f"{PYTHON}:/usr/bin"}
    assert launcher_env(Job(4, ("w",)), HOSTS, "slurm", {"OMPI_MCA_pml": "ucx"})["OMPI_MCA_pml"] == "ucx"


def test_srun_hands_the_interface_to_mpi():
    job = Job(4, ("w",), nic="ib0")
    assert launcher_env(job, HOSTS, "slurm", {})["OMPI_MCA_btl_tcp_if_include"] == "ib0"
    assert launcher_env(job, HOSTS, "slurm", {"OMPI_MCA_btl_tcp_if_include": "ib1"})["OMPI_MCA_btl_tcp_if_include"] == "ib1"
    assert "OMPI_MCA_btl_tcp_if_include" not in launcher_env(job, HOSTS, "slurm", {"OMPI_MCA_btl_tcp_if_exclude": "lo"})
    assert "OMPI_MCA_btl_tcp_if_include" not in launcher_env(Job(4, ("w",)), HOSTS, "slurm", {})


def test_hydra_is_told_about_ssh():
    env = launcher_env(Job(4, ("w",), ssh=Ssh(port=2222)), HOSTS, "hydra", {})
    options = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=3 -o ServerAliveCountMax=2 -p 2222"
    assert env["HYDRA_LAUNCHER_EXTRA_ARGS"] == env["I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS"] == options


def test_the_ssh_of_launchers_adds_keepalive_and_gives_host_keys_back(tmp_path):
    """It must find the real ssh behind itself, whatever else is on the way, and hand every other word on unchanged."""
    (tmp_path / "ssh").write_text('#!/bin/sh\nprintf "%s\\n" "$PATH" "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    again = tmp_path / "again"
    again.symlink_to(SSH_WRAPPER)
    path = f"{SSH_WRAPPER}:/no such folder/*:{again}:{tmp_path}:/usr/bin:/bin"
    words = ["-o", "PasswordAuthentication=no", "-o", "StrictHostKeyChecking=no", "gpu1", "cd / ; env A='x  *' $HOME"]
    done = subprocess.run(["ssh", *words], env={"PATH": path}, capture_output=True, text=True, check=True)
    seen_path, *seen = done.stdout.splitlines()
    assert seen_path == f"/no such folder/*:{tmp_path}:/usr/bin:/bin"
    keepalive = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=2"]
    assert seen == [*keepalive, *words[:3], "BatchMode=yes", *words[4:]]


def test_without_an_ssh_behind_it_the_wrapper_fails():
    env = {"PATH": str(SSH_WRAPPER)}
    done = subprocess.run([str(SSH_WRAPPER / "ssh"), "gpu1"], env=env, capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode == 127
    assert "ssh" in done.stderr


def test_the_ssh_of_launchers_can_be_run():
    assert os.access(SSH_WRAPPER / "ssh", os.X_OK)
