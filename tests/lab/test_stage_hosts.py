"""The data set to the disks of several hosts: copied, checked, resumed, repaired, and never twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import Lab

from horoyolo.data.spec import load_data_spec
from horoyolo.data.staging import Layout, plan_layout
from horoyolo.data.synthetic import write_synthetic

PAD_BYTES = 2**19  # behind each JPEG's end, where no decoder looks
NUM_IMAGES = 12

# What `launch --stage` does on the host it is started on; prints what workers are given.
STAGE = """
import sys
from horoyolo.data.spec import load_data_spec
from horoyolo.data.staging import plan_layout
from horoyolo.launch.hosts import parse_host_list
from horoyolo.launch.stage import Stage
stage = Stage(plan_layout(load_data_spec(sys.argv[1])), sys.argv[2])
problems = stage.stage_all(parse_host_list(sys.argv[3]))
print(stage.data)
for problem in problems:
    print(problem, file=sys.stderr)
sys.exit(bool(problems))
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of about 6 MB that doesn't compress."""
    write_synthetic(tmp_path / "data", NUM_IMAGES, 0)
    noise = random.Random(0)
    for image in sorted((tmp_path / "data" / "images").rglob("*.jpg")):
        with image.open("ab") as stream:
            stream.write(noise.randbytes(PAD_BYTES))
    return tmp_path / "data" / "data.yaml"


@pytest.fixture
def layout(data: Path) -> Layout:
    return plan_layout(load_data_spec(data))


@pytest.fixture
def disk(lab: Lab, tmp_path: Path) -> Path:
    """A folder that is a disk of its own on each of three hosts."""
    folder = tmp_path / "disk"
    folder.mkdir()
    for host in lab.hosts:
        lab.mount_tmpfs(host, folder)
    return folder


def words(data: Path, disk: Path, hosts: str = "node1:1,node2:1,node3:1") -> list[str]:
    return [sys.executable, "-c", STAGE, str(data), str(disk), hosts]


def listed(lab: Lab, host: str, disk: Path) -> list[str]:
    return lab.run(host, ["ls", "-A", str(disk)], check=True).stdout.split()


def assert_same_files(lab: Lab, host: str, layout: Layout, folder: str) -> None:
    pairs = [word for name, source in layout.files for word in (str(source), f"{folder}/{name}")]
    lab.run(host, ["sh", "-ec", 'while [ $# -gt 0 ]; do cmp "$1" "$2"; shift 2; done', "sh", *pairs], check=True)


def received_bytes(lab: Lab, host: str) -> int:
    return int(lab.run(host, ["cat", "/sys/class/net/eth0/statistics/rx_bytes"], check=True).stdout)


def wait_until(condition: Callable[[], bool], limit_s: float = 30) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_every_host_gets_a_checked_copy_once(lab: Lab, data: Path, layout: Layout, disk: Path) -> None:
    done = lab.run("node1", words(data, disk), timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{disk}/{layout.name}/data.yaml"
    for host in lab.hosts:
        assert listed(lab, host, disk) == [layout.name]
        assert f"stage: {host}: {disk}/{layout.name} is there and checked" in done.stderr
        check = lab.run(host, [sys.executable, "-m", "horoyolo", "data", "check", "--data", done.stdout.strip(), "--json", "-"])
        assert layout.hash in check.stdout
        assert_same_files(lab, host, layout, f"{disk}/{layout.name}")

    before = received_bytes(lab, "node2")
    again = lab.run("node1", words(data, disk), timeout=120)
    assert again.returncode == 0
    assert [line.endswith("is there already") for line in again.stderr.splitlines()] == [True] * 3
    assert received_bytes(lab, "node2") - before < PAD_BYTES  # nothing was sent but questions


def test_an_interrupted_copy_is_never_taken_for_a_whole_one_and_goes_on(lab: Lab, data: Path, layout: Layout, disk: Path) -> None:
    partial = f".{layout.name}.node2.partial"
    lab.shape("node2", "16mbit")  # 3 s for it all
    process = lab.popen("node1", words(data, disk, "node2:1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        image = f"{disk}/{partial}/{layout.files[2][0]}"
        wait_until(lambda: lab.run("node2", ["test", "-s", image]).returncode == 0)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: lab.run("node2", ["pgrep", "-x", "rsync"]).returncode != 0)
    assert listed(lab, "node2", disk) == [partial]

    lab.unshape("node2")
    before = received_bytes(lab, "node2")
    done = lab.run("node1", words(data, disk, "node2:1"), timeout=120)
    assert done.returncode == 0, done.stderr
    assert listed(lab, "node2", disk) == [layout.name]
    assert received_bytes(lab, "node2") - before < layout.num_bytes - 1.5 * PAD_BYTES  # at least two images were not sent again


def test_a_corrupted_copy_is_noticed_and_repaired(lab: Lab, data: Path, layout: Layout, disk: Path) -> None:
    assert lab.run("node1", words(data, disk, "node2:1,node3:1"), timeout=120).returncode == 0
    label = next(f"{disk}/{layout.name}/{name}" for name, source in layout.files if name.endswith(".txt") and source.stat().st_size)
    image = next(f"{disk}/{layout.name}/{name}" for name, _ in layout.files if name.endswith(".jpg"))
    lab.run("node2", ["sh", "-ec", f"sed -i 's/^0 /1 /; s/^2 /1 /; s/ 0\\./ 0.0/' {label}"], check=True)
    lab.run("node3", ["truncate", "-s", "-100", image], check=True)

    done = lab.run("node1", words(data, disk, "node2:1,node3:1"), timeout=120)
    assert done.returncode == 0, done.stderr
    for host in ("node2", "node3"):
        assert f"stage: {host}: {disk}/{layout.name} is there, but not as it should be: repairing it" in done.stderr
        assert listed(lab, host, disk) == [layout.name]
        assert_same_files(lab, host, layout, f"{disk}/{layout.name}")


def test_hosts_that_can_take_no_copy_are_named_with_the_remedy(lab: Lab, data: Path, layout: Layout, disk: Path, tmp_path: Path) -> None:
    lab.unmount("node1", disk)
    lab.mount_tmpfs("node1", disk, "4m")
    absent = tmp_path / "absent"
    absent.write_text("")
    lab.bind("node2", absent, Path(lab.run("node2", ["sh", "-c", "command -v rsync"], check=True).stdout.strip()).resolve())
    lab.stop_sshd("node3")
    done = lab.run("node1", words(data, disk), timeout=120)
    assert done.returncode == 1
    full, without, refused = [line for line in done.stderr.splitlines() if line]
    assert full.startswith(f"node1: {disk} has 4.2 MB free, the data set needs ")
    assert "make room there" in full
    assert without == "node2: there is no rsync on it, which receives the data: apt install rsync"
    assert refused.startswith("node3: ssh refused: no sshd listens on port 22; start it on node3")
    assert listed(lab, "node1", disk) == listed(lab, "node2", disk) == []
    assert os.path.isdir(disk)
