"""Elastic jobs of stub workers on several hosts: what a lost host, a lost agent and a refused log-in cost, and a partition's two sides."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from netlab import Lab
from training import wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "elastic"))

from elasticjob import LAUNCH, STUB, ElasticJob

HOSTS = "node1 slots=2\nnode2 slots=2\n"


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Callable[..., ElasticJob]:
    """``start(hosts, min_np)``: an elastic job of stub workers, launched on node1."""

    def run(hosts: str = HOSTS, min_np: int = 1, **env: str) -> ElasticJob:
        (tmp_path / "hosts").write_text(hosts)
        words = [[sys.executable, str(STUB), str(tmp_path)], env, str(tmp_path / "hosts"), min_np, None, 15]
        with (tmp_path / "log.txt").open("w") as log:
            process = lab.popen("node1", [sys.executable, "-c", LAUNCH, json.dumps(words)], stdout=log, stderr=log)
        return ElasticJob(process, tmp_path, tmp_path / "hosts")

    return run


def processes(lab: Lab, job: ElasticJob) -> list[int]:
    return [pid for pid in job.processes() if any(pid in lab.processes(host) for host in lab.hosts)]


def workers(places: list[dict[str, Any]]) -> list[str]:
    return [place["worker"] for place in places]


def test_two_hosts_lose_one_and_get_it_back(lab: Lab, start) -> None:
    job = start()
    first = job.wait_for(1, 4)
    assert workers(first) == ["node1.0", "node1.1", "node2.0", "node2.1"]
    assert {place["iface"] for place in first} == {"eth0"}
    assert first[0]["addr"].startswith("10.77.")
    assert [(place["local_rank"], place["cross_rank"], place["cross_size"]) for place in first] == [(0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2)]
    begin_s = time.monotonic()
    lab.cut("node2")
    second = job.wait_for(2, 2)
    assert time.monotonic() - begin_s < 20
    assert workers(second) == ["node1.0", "node1.1"]
    # The other side ends by itself.
    wait_until(lambda: not [pid for pid in job.processes() if pid in lab.processes("node2")], timeout_s=30)
    lab.heal("node2")
    third = job.wait_for(3, 4, timeout_s=60)
    assert workers(third) == ["node1.0", "node1.1", "node2.0", "node2.1"]
    job.process.kill()
    job.process.wait()
    wait_until(lambda: not processes(lab, job), timeout_s=20)


def test_a_worker_that_dies_on_another_host_costs_that_slot_alone(lab: Lab, start) -> None:
    job = start()
    first = job.wait_for(1, 4)
    begin_s = time.monotonic()
    lab.run("node2", ["pkill", "-KILL", "-f", "-n", str(STUB)], check=True)
    second = job.wait_for(2, 3)
    assert time.monotonic() - begin_s < 3
    assert len(set(workers(second)) & set(workers(first))) == 3
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert not processes(lab, job)


def test_a_host_that_refuses_is_named_and_the_others_go_on(lab: Lab, start) -> None:
    lab.stop_sshd("node2")
    job = start("node1 slots=1\nnode2 slots=1\nnode3 slots=1\n")
    first = job.wait_for(1, 2, timeout_s=60)
    assert workers(first) == ["node1.0", "node3.0"]
    assert "node2 is lost: ssh: connect to host node2 port 22: Connection refused" in job.log()
    # A new host joins while the job runs, another leaves.
    job.hostfile.write_text("node1 slots=2\nnode3 slots=1\n")
    assert workers(job.wait_for(2, 3)) == ["node1.0", "node1.1", "node3.0"]
    job.hostfile.write_text("node1 slots=2\n")
    third = job.wait_for(3, 2)
    assert {place["iface"] for place in third} == {"lo"}
    wait_until(lambda: not [pid for pid in job.processes() if pid in lab.processes("node3")], timeout_s=20)


def test_too_few_hosts_that_can_be_reached_end_the_job(lab: Lab, start) -> None:
    lab.stop_sshd("node2")
    job = start("node1 slots=1\nnode2 slots=1\n", min_np=2)
    assert job.wait(90) == 1
    assert "node2 can't be used" in job.log()
    assert not processes(lab, job)
