from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from horoyolo.cli import main
from horoyolo.data.synthetic import write_synthetic


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> list[str]:
    """The words of a small training."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(folder, 8, seed=0)
    return ["train", "--data", str(folder / "data.yaml"), "--cfg", "yolov5n", "--img", "64", "--batch", "4"]


@pytest.fixture
def hosts(tmp_path) -> Path:
    """A hostfile of this machine and one that no packet reaches."""
    path = tmp_path / "hosts"
    path.write_text("localhost slots=2\n198.51.100.1 slots=1\n")
    return path


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-np", "3"], "give --min-np"),
        (["--slots-per-host", "3"], "give --min-np"),
        (["--kubernetes"], "give --min-np"),
        (["--min-np", "0"], "at least 1"),
        (["--min-np", "3", "--max-np", "2"], "less than --min-np 3"),
        (["--min-np", "5"], "batch = 4 over 5 workers"),
        (["--min-np", "1", "--hang-timeout", "nan"], "at least 3"),
        (["--min-np", "1", "-np", "2"], "-np"),
        (["--min-np", "1", "--launcher", "mpirun"], "--launcher"),
        (["--min-np", "1", "--slurm", "--container-image", "img"], "containers"),
        (["--min-np", "1", "--container-image", "img"], "belongs to --slurm"),
        (["--min-np", "1", "--transport", "mpi"], "gloo"),
        (["--min-np", "1", "--script", "x"], "--slurm"),
        (["--min-np", "1", "--hostfile", "no/such/file"], "no/such/file"),
        (["--min-np", "1", "--discovery-script", "no/such/file"], "HOST:SLOTS"),
        (["--min-np", "4", "--hosts", "a:2,b:1"], "3 slots on 2 hosts (--hosts)"),
        (["--min-np", "1", "--hosts", "a:x"], "--hosts, entry 1"),
        (["--min-np", "1", "--hosts", "[2001:db8::7]:1"], "takes no IPv6 address (2001:db8::7)"),
    ],
)
def test_bad_flags_are_told_in_one_line(flags, says, train, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *flags, "--", *train]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not list(tmp_path.iterdir())


def test_an_allocation_with_too_few_slots_is_told_at_once(train, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x3)")
    assert main(["launch", "--min-np", "4", "--slurm", "--", *train]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--min-np 4, but 3 slots on 3 hosts (--slurm)" in line


def test_the_dry_run_says_what_each_host_would_run(train, hosts, capsys, monkeypatch):
    monkeypatch.setenv("HOROVOD_LOG_LEVEL", "info")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main(["launch", "--min-np", "1", "--hostfile", str(hosts), "--dry-run", "--", *train]) == 0
    here, there, env, job = capsys.readouterr().out.splitlines()
    assert shlex.split(here, comments=True)[-3:-1] == ["-m", "horoyolo.elastic.agent"]
    assert shlex.split(there)[0] == "ssh"
    assert "198.51.100.1: 1 workers" in there
    told = shlex.split(env.removesuffix("\\"))
    assert {"HOROVOD_CONTROLLER=gloo", "HOROVOD_LOG_LEVEL=info", "HOROVOD_GLOO_TIMEOUT_SECONDS=120"} <= set(told)
    assert not any("AWS" in word or word.startswith("OMP_NUM") for word in told)
    assert shlex.split(job) == [sys.executable, "-m", "horoyolo", *train, "--elastic"]


def test_the_interface_of_the_user_is_nccls_too(train, capsys, monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    flags = ["launch", "--min-np", "1", "--nic", "lo", "--dry-run", "--", *train]
    for told in ("lo", "eth7"):
        assert main(flags) == 0
        assert f"NCCL_SOCKET_IFNAME={told}" in shlex.split(capsys.readouterr().out.splitlines()[-2].removesuffix("\\"))
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
