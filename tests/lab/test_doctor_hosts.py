"""The doctor on several hosts, each with a fault of its own: it finds each one and names host and remedy, and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from netlab import Lab

from horoyolo.data.synthetic import write_synthetic
from horoyolo.launch.judge import SLOW_MBIT_S

Findings = dict[tuple[str, str, str], dict[str, str]]  # severity, host, check -> finding


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """The folder from which the job is to start; the same on all hosts, as is all of the disk."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def run_doctor(lab: Lab, workdir: Path, *flags: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, text and JSON of a doctor on node1."""
    result = workdir.parent / "doctor.json"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = lab.run("node1", [sys.executable, "-m", "horoyolo", "doctor", *flags, "--json", str(result)], {"PATH": path}, workdir, timeout=240)
    assert result.exists(), done.stderr
    return done.returncode, done.stdout, json.loads(result.read_text())


def errors_of(result: dict[str, Any]) -> Findings:
    return {(it["severity"], it["host"], it["check"]): it for it in result["findings"] if it["severity"] == "error"}


def host_list(lab: Lab, **slots: int) -> str:
    return ",".join(f"{host}:{slots.get(host, 1)}" for host in lab.hosts)


def installed(distribution: str) -> Path:
    """The folder of an installed package's metadata."""
    return Path(str(importlib.metadata.distribution(distribution)._path))  # type: ignore[attr-defined]


def test_healthy_hosts_pass(lab: Lab, workdir: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "data", 6, 0)
    hostfile = tmp_path / "hosts.txt"
    hostfile.write_text("node1 slots=1\nnode2 slots=1  # a comment\n\nnode3 slots=1\n")
    status, text, result = run_doctor(lab, workdir, "--hostfile", str(hostfile), "--data", str(tmp_path / "data" / "data.yaml"))
    assert errors_of(result) == {}, text
    assert status == 0
    assert result["nic"] == "eth0"  # what leads to the others
    assert [row.split()[0] for row in text.splitlines() if row.startswith("node")] == lab.hosts
    assert {(link["source"], link["target"]) for link in result["links"]} == {("node1", "node2"), ("node2", "node3"), ("node3", "node1")}
    assert all(link["mbit_s"] > SLOW_MBIT_S for link in result["links"])
    assert [rank["host"] for rank in result["mpi"]["ranks"]] == lab.hosts, result["mpi"]
    assert "over MPI (Open MPI" in text
    assert len({facts["data"]["hash"] for facts in result["hosts"].values()}) == 1


def test_hosts_that_cannot_be_asked_or_hold_something_else(make_lab: Callable[[int], Lab], workdir: Path, tmp_path: Path) -> None:
    lab = make_lab(7)
    write_synthetic(tmp_path / "data", 6, 0)
    lab.stop_sshd("node2")
    lab.cut("node3")
    lab.bind("node4", "/dev/null", lab.folder / "id.pub")  # the key is not accepted there
    other_torch = tmp_path / "METADATA"
    metadata = installed("torch") / "METADATA"
    other_torch.write_text(metadata.read_text().replace(f"\nVersion: {importlib.metadata.version('torch')}\n", "\nVersion: 2.12.1\n"))
    lab.bind("node5", other_torch, metadata)
    lab.mount_tmpfs("node6", installed("tqdm"))
    other_data = tmp_path / "other"
    shutil.copytree(tmp_path / "data" / "labels", other_data)
    label = next(file for file in sorted((other_data / "train").iterdir()) if file.read_text().strip())
    label.write_text(label.read_text() + "0 0.5 0.5 0.125 0.125\n")
    lab.bind("node7", other_data, tmp_path / "data" / "labels")
    data = str(tmp_path / "data" / "data.yaml")

    status, text, result = run_doctor(lab, workdir, "--hosts", host_list(lab), "--nic", "eth0", "--data", data)
    found = errors_of(result)
    torch = importlib.metadata.version("torch")
    expected = {
        ("error", "node2", "ssh"): ("no sshd listens on port 22", "start it on node2"),
        ("error", "node3", "ssh"): ("the host is down", "switch node3 on"),
        ("error", "node4", "ssh"): ("refused the log-in", "ssh-copy-id node4"),
        ("error", "node5", "torch"): (f"torch is 2.12.1, but {torch} on node1, node6, node7", f"on node5: pip install torch=={torch}"),
        ("error", "node5", "horovod"): (f"built for torch {torch}, but torch is 2.12.1", "on node5"),
        ("error", "node6", "tqdm"): ("package tqdm is missing", f"on node6: {sys.executable} -m pip install tqdm=="),
        ("error", "node7", "data"): ("its data set differs: train", f"copy {data} to node7 again"),
    }
    assert found.keys() == expected.keys(), text
    for key, (message, remedy) in expected.items():
        assert message in found[key]["message"]
        assert remedy in found[key]["remedy"]
        assert f"error   {key[1]}: {key[2]}: " in text
    assert status == 1
    assert "node2, node3, node4 could not be asked" in text


def test_hosts_with_faults_of_network_and_room(make_lab: Callable[[int], Lab], workdir: Path) -> None:
    lab = make_lab(6)
    lab.hosts_file("node2").write_text("127.0.1.1 node2\n" + lab.hosts_file("node2").read_text())
    lab.run("node3", ["sh", "-ec", "ip link set eth0 down; ip link set eth0 name lan0; ip link set lan0 up"], check=True)
    lab.shape("node4", "100mbit")
    lab.mount_tmpfs("node5", workdir, "4m")
    lab.run("node5", ["dd", "if=/dev/zero", f"of={workdir}/full", "bs=1M"])
    cores = len(os.sched_getaffinity(0))

    status, text, result = run_doctor(lab, workdir, "--hosts", host_list(lab, node6=cores + 1), "--nic", "eth0")
    found = errors_of(result)
    expected = {
        ("error", "node2", "names"): ("its own name node2 resolves to 127.0.1.1", "in /etc/hosts of node2: `10.77.0.2 node2`"),
        ("error", "node3", "interface"): ("there is no network interface eth0", "node3 has lan0, lo"),
        ("error", "node4", "link"): ("it sends slowly to node5", "of node4"),
        ("error", "node5", "workdir"): (f"{workdir} has 0 B free of 4.2 MB", "on node5: free some"),
        ("error", "node6", "slots"): (f"{cores + 1} slots, but only {cores} cores", f"slots={cores} for node6"),
    }
    assert found.keys() == expected.keys(), text
    for key, (_, remedy) in expected.items():
        assert remedy in found[key]["remedy"]
    messages = {(it["host"], it["message"].split(":")[0]): it["message"] for it in result["findings"]}
    for (_, host, _), (message, _) in expected.items():
        assert any(message in it for (name, _), it in messages.items() if name == host), text
    assert 80 < float(messages["node4", "it sends slowly to node5"].split()[5]) < 105  # Mbit/s
    assert ("node4", "it receives slowly from node2") in messages
    assert status == 1
