"""``bench elastic`` on three hosts: a worker is killed, ours and stock Horovod's others go on, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

from netlab import Lab
from training import ENV, HOROYOLO, TIMEOUT_S, wait_until

HOSTS = "node1:1,node2:1,node3:1"


def test_workers_are_killed_and_the_others_go_on(lab: Lab, tmp_path: Path) -> None:
    before = {host: lab.processes(host) for host in lab.hosts}
    path = tmp_path / "report.json"
    words = ["--hosts", HOSTS, "--kills", "1", "--repeats", "0", "--batch", "2", "--peers", "stock"]
    argv = [*HOROYOLO, "bench", "elastic", *words, "--folder", str(tmp_path / "runs"), "--json", str(path)]
    lab.run("node1", argv, env=ENV, timeout=TIMEOUT_S, check=True)
    recovery = json.loads(path.read_text())["recovery"]
    assert list(recovery) == ["horoyolo, elastic", "stock Horovod, commit every 1"]
    ours = recovery["horoyolo, elastic"]
    assert ours["never"] == 0
    assert ours["repeated_steps"] == 0
    assert 0 < ours["median_s"] < 60
    wait_until(lambda: {host: lab.processes(host) for host in lab.hosts} == before, timeout_s=30)
    assert not list((tmp_path / "runs").iterdir())
