"""The laws of the lab itself: what is each host's own, what is common, what a fault looks like, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from netlab import HostProcess, Lab, LabError, labs

HERE = Path(__file__).parent

RECEIVE = """
import socket
with socket.create_server(("", 5000)) as server:
    print("listening", flush=True)
    connection = server.accept()[0]
    while connection.recv(1 << 20):
        pass
    connection.send(b"x")
"""
SEND = """
import socket, sys, time
data = bytes(int(sys.argv[2]))
with socket.create_connection((sys.argv[1], 5000), timeout=20) as connection:
    start_s = time.monotonic()
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(8 * len(data) / (time.monotonic() - start_s) / 1e6)
"""


def python(lab: Lab, host: str, program: str, *arguments: object) -> str:
    return lab.run(host, [sys.executable, "-c", program, *map(str, arguments)], check=True).stdout


def ssh(lab: Lab, source: str, target: str, command: str, timeout_s: int = 10) -> subprocess.CompletedProcess[str]:
    return lab.run(source, ["ssh", "-o", f"ConnectTimeout={timeout_s}", target, command])


def measure_mbits(lab: Lab, source: str, target: str, num_bytes: int = 4_000_000) -> float:
    """Rate at which one TCP stream goes from one host to another, in Mbit/s."""
    with lab.popen(target, [sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "listening\n"
        return float(python(lab, source, SEND, target, num_bytes))


def test_each_host_has_its_name_network_and_processes(lab: Lab) -> None:
    assert lab.hosts == ["node1", "node2", "node3"]
    for host in lab.hosts:
        assert lab.run(host, ["hostname"]).stdout == f"{host}\n"
        assert os.listdir(lab.inside(host, "/sys/class/net")) == lab.run(host, ["ls", "-U", "/sys/class/net"]).stdout.split()
        assert sorted(lab.run(host, ["ls", "/sys/class/net"]).stdout.split()) == ["eth0", "lo"]
        addresses = lab.run(host, ["ip", "-brief", "-4", "address", "show", "dev", "eth0"]).stdout
        assert f"{lab.address(host)}/24" in addresses.split()
    with lab.popen("node2", ["sleep", "60"]) as program:
        assert program.program_pid() in lab.processes("node2")
        assert program.program_pid() not in lab.processes("node1")
        assert "sleep 60" in lab.run("node2", ["ps", "ax"]).stdout
        assert "sleep 60" not in lab.run("node1", ["ps", "ax"]).stdout
        program.terminate()
        assert program.wait(5) == -signal.SIGTERM


def test_names_are_routable_addresses_and_ssh_lands_there(lab: Lab) -> None:
    for source in lab.hosts:
        for target in lab.hosts:  # its own name too: on 127.0.1.1 it would send the other hosts to themselves
            assert python(lab, source, "import socket, sys; print(socket.gethostbyname(sys.argv[1]))", target).strip() == lab.address(target)
    done = ssh(lab, "node1", "node3", "hostname; ssh node2 hostname; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("node3\nnode2\n", "", 7)
    unknown = ssh(lab, "node1", "node9", "true")
    assert unknown.returncode == 255
    assert "Could not resolve hostname node9" in unknown.stderr


def test_environment_folder_input_status_and_time_limit_of_a_program(lab: Lab, tmp_path: Path) -> None:
    done = lab.run("node1", ["sh", "-c", 'pwd; echo "$WORD"; cat; echo oops >&2; exit 3'], env={"WORD": "a b"}, cwd=tmp_path, input="in")
    assert (done.stdout, done.stderr, done.returncode) == (f"{tmp_path}\na b\nin", "oops\n", 3)
    with pytest.raises(LabError, match="node1: false ended with 1"):
        lab.run("node1", ["false"], check=True)
    before = lab.processes("node1")
    with pytest.raises(subprocess.TimeoutExpired):
        lab.run("node1", ["sleep", "60"], timeout=0.3)
    assert lab.processes("node1") == before


def test_the_disk_is_common_and_mounts_are_a_hosts_own(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("common")
    (tmp_path / "other").write_text("other")
    lab.mount_tmpfs("node2", tmp_path / "small", "1m")
    full = lab.run("node2", ["dd", "if=/dev/zero", f"of={tmp_path}/small/zeros", "bs=64k", "count=64"])
    assert full.returncode == 1
    assert "No space left on device" in full.stderr
    lab.bind("node3", tmp_path / "other", tmp_path / "file")
    assert not list((tmp_path / "small").iterdir())
    assert [lab.run(host, ["cat", f"{tmp_path}/file"]).stdout for host in lab.hosts] == ["common", "common", "other"]
    # A program's temporary files are its host's, as on real machines; /tmp is on the common disk, where the tests' own files are.
    made = Path(python(lab, "node1", "import tempfile; print(tempfile.mkdtemp())").strip())
    assert lab.run("node1", ["test", "-d", str(made)]).returncode == 0
    assert ssh(lab, "node1", "node2", f"test -d {made}").returncode == 1
    assert ssh(lab, "node1", "node2", "echo $TMPDIR").stdout.strip() == str(made.parent)
    # Nor does a shell there read the start-up files of whoever runs the tests.
    lab.run("node1", ["sh", "-c", 'cd "$HOME" && touch mine'], check=True)
    assert ssh(lab, "node1", "node1", "ls -A ~").stdout == "mine\n"
    assert ssh(lab, "node1", "node2", "ls -A ~").stdout == ""


@pytest.mark.parametrize(("source", "target"), [("node1", "node2"), ("node2", "node1")])
def test_a_shaped_link_is_slow_both_ways(lab: Lab, source: str, target: str) -> None:
    lab.shape("node2", "100mbit")
    # The first 256 kB pass at once, so what is measured is a little more than the rate.
    assert 50 < measure_mbits(lab, source, target) < 125
    assert measure_mbits(lab, "node1", "node3") > 250
    lab.unshape("node2")
    assert measure_mbits(lab, source, target) > 250


def test_a_cut_host_is_silent_until_it_is_healed(lab: Lab) -> None:
    lab.cut("node2")
    done = ssh(lab, "node1", "node2", "true", timeout_s=1)
    assert done.returncode == 255
    assert "timed out" in done.stderr
    assert ssh(lab, "node1", "node3", "hostname").stdout == "node3\n"
    lab.heal("node2")
    assert ssh(lab, "node1", "node2", "hostname").stdout == "node2\n"


def test_a_stopped_sshd_refuses_and_can_be_started_again(lab: Lab) -> None:
    lab.stop_sshd("node2")
    done = ssh(lab, "node1", "node2", "true")
    assert done.returncode == 255
    assert "refused" in done.stderr
    lab.start_sshd("node2")
    assert ssh(lab, "node1", "node2", "hostname").stdout == "node2\n"


def test_a_host_can_be_added(make_lab) -> None:
    lab = make_lab(1)
    assert lab.add_host() == "node2"
    assert ssh(lab, "node1", "node2", "hostname").stdout == "node2\n"
    assert ssh(lab, "node2", "node1", "hostname").stdout == "node1\n"


def test_a_hosts_file_is_its_own(lab: Lab) -> None:
    lab.hosts_file("node2").write_text("127.0.0.1 localhost\n127.0.1.1 node2\n")
    resolve = "import socket; print(socket.gethostbyname('node2'))"
    assert python(lab, "node2", resolve) == "127.0.1.1\n"
    assert python(lab, "node1", resolve) == f"{lab.address('node2')}\n"


def test_two_labs_at_once_do_not_meet(make_lab) -> None:
    first, second = make_lab(2), make_lab(2)
    assert first.id != second.id
    assert {first.id, second.id} <= {lab.id for lab in labs()}
    for lab in (first, second):
        lab.run("node2", ["sh", "-c", f"echo {lab.id} > /run/whose"], check=True)
    first.cut("node1")
    assert ssh(second, "node1", "node2", "cat /run/whose").stdout == f"{second.id}\n"
    first.down()
    assert ssh(second, "node1", "node2", "cat /run/whose").stdout == f"{second.id}\n"
    with pytest.raises(LabError, match=f"no lab '{first.id}'; up are: .*{second.id}"):
        Lab.attach(first.id)
    with pytest.raises(LabError, match="is down"):
        first.run("node1", ["true"])


def test_the_machine_itself_is_not_changed(make_lab) -> None:
    def machine() -> list[object]:
        commands = (["ip", "-oneline", "link"], ["ip", "address"], ["ip", "route"], ["findmnt", "--list", "--noheadings", "--output", "TARGET"])
        read = [subprocess.run(command, capture_output=True, text=True, check=False).stdout for command in commands]
        return [*read, os.uname().nodename, Path("/etc/hosts").read_text(), Path("~/.ssh").expanduser().exists()]

    before = machine()
    lab = make_lab(2)
    assert ssh(lab, "node1", "node2", "true").returncode == 0
    assert machine() == before


def processes_of(lab: Lab) -> list[HostProcess]:
    """Things that would rather stay: deaf to signals, in a session of their own, over ssh."""
    deaf = ["sh", "-c", "trap '' TERM INT HUP; echo up; while :; do sleep 1; done"]
    started = [lab.popen("node1", argv, stdout=subprocess.PIPE) for argv in (deaf, ["setsid", *deaf], ["ssh", "node2", *deaf[:2], f'"{deaf[2]}"'])]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
    return started


def test_nothing_is_left_of_a_lab(make_lab) -> None:
    lab = make_lab(2)
    started = processes_of(lab)
    pids = [pid for host in lab.hosts for pid in lab.processes(host)] + list(lab.first_pids.values())
    assert len(pids) >= 8
    lab.down()
    assert not lab.folder.exists()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    for process in started:
        process.communicate(timeout=5)
    lab.down()  # again: nothing


OWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from netlab import Lab
lab = Lab.up(2)
lab.popen("node1", ["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1; done"])
print(lab.id, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lab_ends_with_its_owner(make_lab, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, HERE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        orphan = Lab.attach(owner.stdout.readline().strip())
        pids = [orphan.switch, *orphan.first_pids.values(), *orphan.processes("node1")]
        owner.send_signal(number)
    deadline_s = time.monotonic() + 10
    while [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline_s, "it outlives its owner"
        time.sleep(0.05)
    make_lab(1)  # the next one tidies up
    assert not orphan.folder.exists()


def test_the_command(tmp_path: Path) -> None:
    script = HERE.parents[1] / "scripts" / "lab.sh"

    def lab_sh(*words: str, status: int = 0) -> str:
        done = subprocess.run([script, *words], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr if status else done.stdout

    lab_id = lab_sh("up", "2").strip()
    try:
        assert f"lab {lab_id}\n  node1 " in lab_sh("status")
        assert lab_sh("--lab", lab_id, "exec", "node1", "ssh", "node2", "hostname; exit 5", status=5) == "node2\n"
        for words in (("shape", "node2", "200mbit"), ("unshape", "node2"), ("cut", "node2"), ("heal", "node2")):
            assert lab_sh("--lab", lab_id, *words) == ""
        assert lab_sh("--lab", lab_id, "add") == "node3\n"
        assert "no host 'node9'" in lab_sh("--lab", lab_id, "cut", "node9", status=1)
    finally:
        lab_sh("--lab", lab_id, "down")
    assert lab_id not in lab_sh("status")
    assert f"no lab '{lab_id}'" in lab_sh("--lab", lab_id, "down", status=1)
