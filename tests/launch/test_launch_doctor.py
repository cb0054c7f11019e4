"""The doctor's judgement on made-up answers, its text as a whole, and its probe for real."""

from __future__ import annotations

import configparser
import copy
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from horoyolo.launch import doctor
from horoyolo.launch.hosts import Host
from horoyolo.launch.judge import ERROR, REQUIRED, WARNING, Cluster, Finding, Link, judge, size_text
from horoyolo.launch.remote import Ssh
from horoyolo.launch.session import Session, Unreachable, explain
from horoyolo.launch.table import WIDTH, render

GIB = 2**30
WORKDIR = "/home/ann/yolo"


def healthy(number: int) -> dict[str, Any]:
    """What a healthy host answers."""
    disk = {"total": 100 * GIB, "free": 50 * GIB, "free_inodes": 10**6, "writable": True}
    versions = {"torch": "2.13.0", "horovod": "0.28.1", "horoyolo": "0.1.0", "mpi4py": "4.1.2", "nvidia-nccl-cu13": "2.29.3"}
    return {
        "hostname": f"node{number}",
        "python": {"version": "3.11.7", "executable": "/venv/bin/python"},
        "python_wanted": "/venv/bin/python",
        "packages": {**dict.fromkeys(REQUIRED, "1.0"), **versions},
        "horovod_for_torch": "2.13.0",
        "source": "5ca1ab1e" * 8,
        "interfaces": {
            "eth0": {"up": True, "addresses": [f"10.0.0.{number}"], "speed_mbit_s": 10000},
            "eth1": {"up": False, "addresses": [], "speed_mbit_s": 0},
            "lo": {"up": True, "addresses": ["127.0.0.1", "::1"], "speed_mbit_s": 0},
        },
        "workdir": True,
        "disks": {"workdir": disk, "tmp": dict(disk), "shm": dict(disk)},
        "limits": {"nofile": 65536, "memlock": -1},
        "cores": 16,
        "gpus": ["H100", "H100"],
        "infiniband": False,
        "clock": {"offset_s": 0.0021, "doubt_s": 0.0003},
        "resolved": {f"node{other}": [f"10.0.0.{other}"] for other in range(1, 65)},
        "own_addresses": [f"10.0.0.{number}"],
        "load": {
            **{"cuda": "13.0", "gpus": 2, "nccl": "2.29.3", "horovod": {"gloo": True, "mpi": True, "nccl": True}},
            "computes_on": "cuda in bfloat16",
        },
        "data": {
            "hash": "da7a" * 16,
            "splits": {"train": {"images": 205, "boxes": 2805, "hash": "aa" * 32}, "val": {"images": 87, "boxes": 1138, "hash": "bb" * 32}},
        },
    }


def cluster_of(number: int) -> Cluster:
    hosts = [Host(f"node{at}", 2) for at in range(1, number + 1)]
    names = [host.name for host in hosts]
    links = [Link(source, target, 9400.0, 0.05) for source, target in zip(names, [*names[1:], names[0]], strict=True)]
    return Cluster(hosts, WORKDIR, "bccd.yaml", "eth0", facts={name: healthy(at) for at, name in enumerate(names, 1)}, links=links)


def set_at(facts: dict[str, Any], path: str, value: Any) -> None:
    *folders, last = path.split("/")
    for key in folders:
        facts = facts[key]
    facts[last] = value


def told(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.host, finding.check) for finding in findings]


def test_a_healthy_cluster_has_no_findings() -> None:
    assert judge(cluster_of(3)) == []


def test_required_packages_are_those_of_the_distribution() -> None:
    parser = configparser.ConfigParser()
    parser.read(Path(__file__).parents[2] / "setup.cfg")
    wanted = {line.split()[0] for line in parser["options"]["install_requires"].split("\n") if line}
    assert set(REQUIRED) == wanted | {"horovod"}


FAULTS = [
    # what node2 answers otherwise; finding; in the message; in the remedy
    ("python/version", "3.12.1", ERROR, "python", "3.12.1, but 3.11.7 on node1, node3", "install Python 3.11.7 on node2"),
    ("python_wanted", "/home/ann/venv/bin/python", ERROR, "python", "no /home/ann/venv/bin/python", "on node2 at the same path"),
    ("workdir", False, ERROR, "workdir", "no folder /home/ann/yolo", "node2"),
    ("packages/tqdm", "", ERROR, "tqdm", "package tqdm is missing", "on node2: /venv/bin/python -m pip install tqdm==1.0"),
    ("packages/tqdm", "0.9", WARNING, "tqdm", "0.9, but 1.0 on node1, node3", "pip install tqdm==1.0"),
    ("packages/horovod", "", ERROR, "horovod", "package horovod is missing", "on node2: scripts/setup.sh"),
    ("horovod_for_torch", "2.12.0", ERROR, "horovod", "built for torch 2.12.0, but torch is 2.13.0", "on node2"),
    ("load/error", "ImportError: libmpi.so.40", ERROR, "horovod", "ImportError: libmpi.so.40", "on node2"),
    ("load/cuda", "12.8", ERROR, "cuda", "12.8, but 13.0 on node1, node3", "on node2"),
    ("load/nccl", "2.27.1", ERROR, "nccl", "2.27.1, but 2.29.3 on node1, node3", "NCCL 2.29.3"),
    ("load/computes_on", "cpu in float32", WARNING, "precision", "computes on cpu in float32, but", "--precision fp32"),
    ("source", "0ddba11" * 9, ERROR, "horoyolo", "0.1.0 source 0ddba110ddba", "checkout on node2"),
    ("source", "", ERROR, "horoyolo", "horoyolo is missing", "on node2"),
    ("data/error", "horoyolo: error: bccd.yaml is not there", ERROR, "data", "bccd.yaml is not there", "on node2, or let `launch --stage DIR`"),
    ("resolved/node2", ["127.0.1.1"], ERROR, "names", "node2 resolves to 127.0.1.1", "in /etc/hosts of node2: `10.0.0.2 node2`"),
    ("resolved/node2", [], ERROR, "names", "its own name node2 does not resolve", "`10.0.0.2 node2`"),
    ("hostname", "debian", ERROR, "names", "its own name debian does not resolve", "`10.0.0.2 debian`"),
    ("resolved/node3", [], ERROR, "names", "does not resolve node3", "/etc/hosts of node2"),
    ("resolved/node3", ["127.0.0.1"], ERROR, "names", "resolves node3 to 127.0.0.1, which is itself", "/etc/hosts of node2"),
    ("resolved/node3", ["10.0.0.9"], ERROR, "names", "node3 to 10.0.0.9, which node3 does not have", "10.0.0.3 node3"),
    ("interfaces", {"lan0": {"up": True, "addresses": ["10.0.0.2"]}}, ERROR, "interface", "no network interface eth0", "node2 has lan0"),
    ("interfaces/eth0/up", False, ERROR, "interface", "eth0 is down", "ip link set eth0 up"),
    ("interfaces/eth0/addresses", ["fe80::1"], ERROR, "interface", "eth0 has no address", "--nic"),
    ("disks/workdir/free", 10**8, ERROR, "workdir", "/home/ann/yolo has 100 MB free of 107 GB", "on node2: free some"),
    ("disks/workdir/free", 5 * GIB, WARNING, "workdir", "5.4 GB free", "on node2"),
    ("disks/workdir/free_inodes", 0, ERROR, "workdir", "no more files", "on node2"),
    ("disks/workdir/writable", False, ERROR, "workdir", "can't be written to", "on node2"),
    ("disks/tmp/free", 0, ERROR, "tmp", "/tmp has 0 B free", "on node2"),
    ("disks/shm/free", 64 * 2**20, ERROR, "shm", "/dev/shm has 67.1 MB free", "--shm-size"),
    ("disks/shm/free", 900 * 2**20, WARNING, "shm", "1.1 GB are wanted", "--shm-size"),
    ("limits/nofile", 128, ERROR, "limits", "128 files", "nofile"),
    ("limits/nofile", 512, WARNING, "limits", "512 files", "nofile"),
    ("cores", 1, WARNING, "slots", "2 slots, but only 1 cores", "slots=1 for node2"),
    ("gpus", ["H100"], ERROR, "slots", "2 slots, but only 1 GPUs", "slots=1 for node2"),
    ("gpus", [], ERROR, "slots", "no GPU is found, but node1, node3 have some", "node2"),
    ("load/gpus", 0, ERROR, "slots", "torch sees 0 of 2 GPUs", "CUDA 13.0"),
    ("gpus", ["A100", "A100"], WARNING, "slots", "A100, but H100 on node1, node3", "node2"),
    ("clock/offset_s", -3.5, WARNING, "clock", "3.5 s behind", "on node2"),
    ("clock/offset_s", 3600.0, ERROR, "clock", "3600.0 s ahead", "on node2"),
]


@pytest.mark.parametrize(("path", "value", "severity", "check", "message", "remedy"), FAULTS, ids=lambda value: str(value)[:24])
def test_each_fault_is_one_finding_with_host_and_remedy(path: str, value: Any, severity: str, check: str, message: str, remedy: str) -> None:
    cluster = cluster_of(3)
    set_at(cluster.facts["node2"], path, value)
    found = judge(cluster)
    assert told(found) == [(severity, "node2", check)]
    assert message in found[0].message
    assert remedy in found[0].remedy


def test_gpus_without_nccl_cost_something() -> None:
    cluster = cluster_of(2)
    for facts in cluster.facts.values():
        facts["load"]["horovod"]["nccl"] = False
    assert told(judge(cluster)) == [(WARNING, "node1", "horovod"), (WARNING, "node2", "horovod")]
    cluster.facts["node1"]["load"]["horovod"]["nccl"] = True
    assert told(judge(cluster)) == [(ERROR, "node2", "horovod"), (WARNING, "node2", "horovod")]
    for finding in judge(cluster):  # the one script that also installs what it builds
        assert "nvcc" in finding.remedy
        assert "scripts/setup.sh" in finding.remedy


def test_a_clock_is_only_judged_beyond_the_doubt() -> None:
    cluster = cluster_of(2)
    cluster.facts["node2"]["clock"] = {"offset_s": 1.5, "doubt_s": 0.6}
    assert judge(cluster) == []


def test_fewer_slots_than_gpus_leave_some_idle() -> None:
    cluster = cluster_of(2)
    cluster.facts["node2"]["gpus"] = ["H100"] * 8
    cluster.facts["node2"]["load"]["gpus"] = 8
    (found,) = judge(cluster)
    assert (found.severity, found.host, found.message) == (WARNING, "node2", "2 slots for 8 GPUs: 6 stay idle")


def test_more_slots_than_cores_without_gpus_is_an_error() -> None:
    cluster = cluster_of(2)
    for facts in cluster.facts.values():
        facts["gpus"], facts["load"]["gpus"] = [], 0
    cluster.facts["node1"]["cores"] = 1
    assert told(judge(cluster)) == [(ERROR, "node1", "slots")]


def test_memory_locks_matter_with_infiniband() -> None:
    cluster = cluster_of(2)
    cluster.facts["node1"]["limits"]["memlock"] = 8 * 2**20
    assert judge(cluster) == []
    cluster.facts["node1"]["infiniband"] = True
    assert told(judge(cluster)) == [(WARNING, "node1", "limits")]


def test_differing_data_says_in_what() -> None:
    cluster = cluster_of(3)
    other = copy.deepcopy(cluster.facts["node3"]["data"])
    other |= {"hash": "0dd" * 20}
    other["splits"]["train"] = {"images": 204, "boxes": 2800, "hash": "cc" * 32}
    cluster.facts["node3"]["data"] = other
    (found,) = judge(cluster)
    assert (found.severity, found.host, found.check) == (ERROR, "node3", "data")
    assert found.message == (
        "its data set differs: train 204 images, 2800 boxes, hash cccccccccccc, but train 205 images, 2805 boxes, hash aaaaaaaaaaaa on node1, node2"
    )


RING = [("node1", "node2"), ("node2", "node3"), ("node3", "node1")]


@pytest.mark.parametrize(
    ("slow", "expected"),
    [
        ([("node1", "node2"), ("node2", "node3"), ("node2", "node1"), ("node3", "node2")], {"node2": ["receives slowly", "sends slowly"]}),
        ([("node2", "node3"), ("node2", "node1")], {"node2": ["sends slowly"]}),
        ([("node2", "node3"), ("node1", "node3")], {"node3": ["receives slowly"]}),
        ([("node2", "node3")], {"node2": ["between it and node3"], "node3": ["between it and node2"]}),
    ],
)
def test_a_slow_link_is_laid_at_the_door_of_the_end_that_is_slow_with_others_too(slow: list[tuple[str, str]], expected: dict[str, list[str]]) -> None:
    cluster = cluster_of(3)
    pairs = [*RING, *((target, source) for source, target in RING)]
    cluster.links = [Link(*pair, mbit_s=96.0 if pair in slow else 9400.0, round_trip_ms=0.05) for pair in pairs]
    found = judge(cluster)
    assert {finding.severity for finding in found} == {ERROR}
    assert {finding.host for finding in found} == set(expected)
    for host, words in expected.items():
        messages = " ".join(finding.message for finding in found if finding.host == host)
        assert all(word in messages for word in words)
        assert "96 Mbit/s" in messages


def test_links_that_fail_or_lag() -> None:
    cluster = cluster_of(2)
    cluster.links = [Link("node1", "node2", error="timed out"), Link("node2", "node1", 9400.0, 7.0)]
    found = judge(cluster)
    assert told(found) == [(ERROR, "node2", "link"), (WARNING, "node2", "link")]
    assert "node1 can't send to it: timed out" in found[0].message
    assert "firewall" in found[0].remedy


def test_mpi_is_a_warning() -> None:
    cluster = cluster_of(2)
    cluster.mpi = {"error": "bash: orted: command not found", "host": "node1", "command": "mpirun ..."}
    assert told(judge(cluster)) == [(WARNING, "node1", "mpi")]
    cluster.mpi = {"ranks": [{"host": "node1", "mbit_s": 90.0, "round_trip_ms": 0.1}, {"host": "node2", "mbit_s": 9000.0, "round_trip_ms": 0.1}]}
    assert told(judge(cluster)) == [(WARNING, "node1", "mpi")]


SSH_SAYS = [
    ("ssh: Could not resolve hostname node7: Name or service not known", "does not resolve", "/etc/hosts here"),
    ("ssh: connect to host node7 port 2222: Connection refused", "no sshd listens on port 2222", "systemctl start ssh"),
    ("ssh: connect to host node7 port 2222: Connection timed out", "the host is down", "switch node7 on"),
    ("ssh: connect to host node7 port 2222: No route to host", "no route", "switch node7 on"),
    ("root@node7: Permission denied (publickey,password).", "refused the log-in", "ssh-copy-id node7"),
    ("No ED25519 host key is known for node7.\nHost key verification failed.", "not known here", "ssh node7 once by hand"),
    ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "has changed", "ssh-keygen -R '[node7]:2222'"),
    ("kex_exchange_identification: read: Connection reset by peer", "hung up at once", "MaxStartups"),
    ("Timeout, server node7 not responding.", "broke off", "still up"),
    ("something new", "ssh failed: something new", "ssh -v node7"),
]


@pytest.mark.parametrize(("complaint", "message", "remedy"), SSH_SAYS, ids=[says[:30] for says, _, _ in SSH_SAYS])
def test_reasons_of_ssh_are_told_apart(complaint: str, message: str, remedy: str) -> None:
    failure = explain(Host("node7", 1, port=2222), 255, f"Warning: Permanently added something\n{complaint}\n")
    assert failure.check == "ssh"
    assert message in failure.message
    assert remedy in failure.remedy


TABLE = """\
python    3.11.7  (on 2 of 3 hosts)
torch     2.13.0  (on 2 of 3 hosts)
horovod   0.28.1 (gloo, mpi, nccl)  (on 2 of 3 hosts)
cuda      13.0  (on 2 of 3 hosts)
nccl      2.29.3  (on 2 of 3 hosts)
horoyolo  0.1.0 source 5ca1ab1e5ca1  (on 2 of 3 hosts)
data      da7ada7ada7a  (on 2 of 3 hosts)

host   address   slots  cores  GPUs       sends  round trip  workdir     /tmp  /dev/shm  files    memlock     clock  result
node1  10.0.0.1      2     16     2  9.4 Gbit/s     0.05 ms  53.7 GB  53.7 GB   53.7 GB  65536  unlimited  +0.002 s  1 error
node2  10.0.0.2      2     16     2   96 Mbit/s     0.05 ms  53.7 GB  53.7 GB   53.7 GB    512  unlimited  <0.001 s  1 error, 1 warning
node3  -             2      -     -           -           -        -        -         -      -          -         -  1 error

sends, round trip: to the next host of the list over eth0, all at once, over TCP by the doctor's own probe
not measured over MPI: node3 could not be asked

error   node1, node2: names: it does not resolve node3
        -> add it to DNS or to /etc/hosts of HOST

error   node3: ssh: ssh timed out: the host is down or a firewall drops port 22
        -> switch node3 on, or take it out of the host list

warning node2: limits: a process may open 512 files only
        -> on node2, in /etc/security/limits.conf: * soft nofile 65536

3 hosts: 3 errors, 1 warning"""


def test_the_table_as_a_whole() -> None:
    cluster = cluster_of(3)
    del cluster.facts["node3"]
    failure = explain(cluster.hosts[2], 255, "ssh: connect to host node3 port 22: Connection timed out")
    cluster.unreachable["node3"] = Finding(ERROR, "node3", failure.check, failure.message, failure.remedy)
    for facts in cluster.facts.values():
        facts["resolved"]["node3"] = []
    cluster.facts["node2"]["limits"]["nofile"] = 512
    cluster.facts["node2"]["clock"]["offset_s"] = 0.0001
    cluster.links = [Link("node1", "node2", 9400.0, 0.05), Link("node2", "node1", 96.0, 0.05)]
    cluster.mpi = {"skipped": "node3 could not be asked"}
    findings = [finding for finding in judge(cluster) if finding.check != "link"]
    assert render(cluster, findings) == TABLE


def test_64_hosts_stay_readable() -> None:
    cluster = cluster_of(64)
    for facts in cluster.facts.values():
        facts["disks"]["tmp"]["free"] = 10**6
    text = render(cluster, judge(cluster))
    rows = [line for line in text.splitlines() if line.startswith("node")]
    assert len(rows) == 64
    assert all(row.endswith("1 error") for row in rows)
    assert max(map(len, text.splitlines())) <= 140
    assert text.count("/tmp has 1.0 MB free") == 1  # one fault, told once, with all the hosts' names
    story = text.split("error   ", 1)[1]
    assert all(f"node{number}" in story for number in range(1, 65))
    assert all(len(line) <= WIDTH for line in story.splitlines())


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e8, "250 MB"), (1.4e9, "1.4 GB"), (3e12, "3.0 TB")])
def test_sizes_in_words(size: float, text: str) -> None:
    assert size_text(size) == text


# The probe, for real


@pytest.fixture
def open_session() -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def open_one(name: str = "localhost", python: str = sys.executable) -> Session:
        opened.append(Session(Host(name, 1), python, Ssh()))
        return opened[-1]

    yield open_one
    for session in opened:
        session.close()


def test_the_probe_looks_at_this_machine(open_session: Callable[..., Session], tmp_path: Path) -> None:
    session = open_session()
    facts = session.ask("facts", workdir=str(tmp_path), packages=["torch", "no-such-package"])
    assert facts["hostname"] == os.uname().nodename
    assert facts["python"]["executable"] == sys.executable
    assert facts["packages"]["torch"]
    assert facts["packages"]["no-such-package"] == ""
    assert facts["horovod_for_torch"].split("+")[0] == facts["packages"]["torch"].split("+")[0]
    assert facts["interfaces"]["lo"] == {"up": True, "addresses": facts["interfaces"]["lo"]["addresses"], "speed_mbit_s": 0}
    assert "127.0.0.1" in facts["interfaces"]["lo"]["addresses"]
    assert facts["workdir"] is True
    assert facts["disks"]["workdir"]["free"] > 0
    assert facts["limits"]["nofile"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert len(facts["source"]) == 64
    assert session.ask("facts", workdir=str(tmp_path / "absent"), packages=[])["workdir"] is False
    assert session.ask("resolve", names=["localhost", "no-such-host.invalid"])["no-such-host.invalid"] == []
    assert session.ask("owns", addresses=["127.0.0.1", "198.51.100.77"]) == {"addresses": ["127.0.0.1"]}
    clock = doctor._clock(session)
    assert abs(clock["offset_s"]) <= clock["doubt_s"] + 0.001


def test_a_host_without_the_workers_python_is_still_looked_at(open_session: Callable[..., Session], tmp_path: Path) -> None:
    session = open_session(python="/no/such/python")
    facts = session.ask("facts", workdir=str(tmp_path), packages=[])
    assert facts["python"]["executable"] != "/no/such/python"
    cluster = cluster_of(2)
    cluster.facts["node2"] |= {"python": {"version": "3.9.2", "executable": "/usr/bin/python3"}, "packages": {}, "source": "", "load": {}}
    assert told(judge(cluster)) == [(ERROR, "node2", "python")]  # what that Python has or lacks does not matter


def test_what_login_scripts_print_is_no_answer(open_session: Callable[..., Session], tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    noisy.write_text(f'#!/bin/sh\necho "Welcome to node1"\necho warning >&2\nexec {sys.executable} "$@"\n')
    noisy.chmod(0o755)
    assert open_session(python=str(noisy)).ask("clock")["time"] > 0


def test_failed_requests_are_answers_and_a_dead_probe_is_none(open_session: Callable[..., Session]) -> None:
    session = open_session()
    assert "error" in session.ask("listen", address="198.51.100.77", device="", token="t")
    assert "error" in session.ask("send", address="127.0.0.1", device="", to="127.0.0.1", port=1, token="t")
    session._process.kill()
    with pytest.raises(Unreachable, match="probe ended with status -9"):
        session.ask("clock")


def test_a_probe_that_does_not_answer_is_given_up(open_session: Callable[..., Session], tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho hello\nexec sleep 30\n")
    silent.chmod(0o755)
    with pytest.raises(Unreachable, match="no answer in time"):
        open_session(python=str(silent)).ask("clock", 0.3)


def test_a_link_is_measured_for_real_and_strangers_are_not_heard(open_session: Callable[..., Session]) -> None:
    a, b = open_session(), open_session()
    here = {"address": "127.0.0.1", "device": ""}
    port = b.ask("listen", **here, token="right")["port"]
    assert "error" in a.ask("send", **here, to="127.0.0.1", port=port, token="wrong")
    sent = a.ask("send", **here, to="127.0.0.1", port=port, token="right")
    heard = b.ask("heard")
    link = doctor._link(("a", "b"), sent, heard)
    assert not link.error
    assert link.mbit_s > 100
    assert 0 < link.round_trip_ms < 100


def test_doctor_of_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status = doctor.run_doctor([Host("localhost", 1)], json_file=tmp_path / "doctor.json")
    result = json.loads((tmp_path / "doctor.json").read_text())
    facts = result["hosts"]["localhost"]
    assert facts["load"]["horovod"]["gloo"] is True
    assert result["links"] == []
    assert status == (0 if result["ok"] else 1)
    checks = {finding["check"] for finding in result["findings"] if finding["severity"] == ERROR}
    assert checks <= {"workdir", "tmp", "shm", "limits"}  # what this machine may be short of
    assert "localhost" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["doctor", "launch"])
def test_help_starts_fast_and_without_torch(command: str) -> None:
    slow = ("torch", "numpy", "cv2", "PIL", "matplotlib", "albumentations", "horovod", "mpi4py")
    program = f"import sys; sys.modules.update(dict.fromkeys({slow})); from horoyolo.cli import main; main(['{command}', '--help'])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--hostfile" in done.stdout or command == "launch"
    # Time of the processor, not of the clock: other programs may be running. They share its caches, though: 0.25 s become 0.5 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
