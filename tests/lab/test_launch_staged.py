"""``horoyolo launch --stage``: workers train from the copies on their own hosts' disks."""

from __future__ import annotations

from pathlib import Path

import yaml
from netlab import Lab
from training import ENV, HOROYOLO, TIMEOUT_S, check_same_run, steps, train_words


def test_workers_train_from_their_own_copies(lab: Lab, dataset: Path, alone: list[dict[str, str]], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for host in lab.hosts[:2]:
        lab.mount_tmpfs(host, disk)
    # The originals are seen by the first host alone.
    (tmp_path / "nothing").mkdir()
    lab.bind("node2", tmp_path / "nothing", dataset.parent)
    launch = [*HOROYOLO, "launch", "--hosts", "node1:1,node2:1", "--stage", str(disk)]
    job = train_words(dataset, tmp_path)
    planned = lab.run("node1", [*launch, "--dry-run", "--", *job], env=ENV, check=True).stdout
    assert lab.run("node1", ["ls", str(disk)], check=True).stdout == ""  # a dry run copies nothing

    done = lab.run("node1", [*launch, "--", *job], env=ENV, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_run(steps(tmp_path / "run"), alone, num_workers=2)
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert used.startswith(f"{disk}/")
    assert used in planned
    for host in lab.hosts[:2]:
        lab.run(host, ["test", "-f", used], check=True)


def test_a_host_without_room_is_named_and_nothing_starts(lab: Lab, dataset: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    lab.mount_tmpfs("node2", disk, "64k")
    launch = [*HOROYOLO, "launch", "--hosts", "node1:1,node2:1", "--stage", str(disk)]
    done = lab.run("node1", [*launch, "--", *train_words(dataset, tmp_path)], env=ENV, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "node2" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
