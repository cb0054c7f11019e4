from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from elasticjob import wait_until

from horoyolo.elastic.actions import Finish
from horoyolo.elastic.agent import kept_memory
from horoyolo.elastic.coordinator import Coordinator, Elastic
from horoyolo.elastic.membership import Limits
from horoyolo.launch.hosts import Host
from horoyolo.launch.job import Job
from horoyolo.launch.run import SignalLog


def pids(places) -> list[int]:
    return [place["pid"] for place in places]


def test_no_name_is_looked_up_in_the_loop_that_keeps_leases(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("horoyolo.elastic.coordinator.own_address", lambda host: asked.append(host) or "127.0.0.1")
    monkeypatch.setattr("horoyolo.elastic.discovery._look_up", lambda name: "198.51.100.7")
    coordinator = Coordinator(Job(1, (), {}), Elastic(Limits(1), lambda: [Host("far.away", 1)], 60))
    coordinator._discovery.ask_once()
    assert coordinator._network(["far.away"]) == ("127.0.0.1", "lo")
    assert asked == ["198.51.100.7"]
    coordinator.close()


def test_a_dead_worker_costs_its_slot_for_a_while_and_the_others_go_on_at_once(start_elastic):
    job = start_elastic(slots=3, min_np=1)
    first = job.wait_for(1, 3)
    begin_s = time.monotonic()
    os.kill(first[0]["pid"], signal.SIGKILL)
    second = job.wait_for(2, 2)
    assert time.monotonic() - begin_s < 1
    assert pids(second) == pids(first)[1:]  # survivors keep their order; the oldest is rank 0
    third = job.wait_for(3, 3)
    assert 10 < time.monotonic() - begin_s < 20
    assert pids(third)[:2] == pids(second)
    assert third[2]["worker"] == first[0]["worker"]  # in the same slot
    assert "SIGKILL" in job.log()
    for slot in range(3):
        (job.out / f"finish.{slot}").touch()
    assert job.wait() == 0
    assert not job.processes()


def test_standard_error_that_nobody_reads_holds_nobody_up(start_elastic):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(2**16))
    os.set_blocking(writer, True)
    job = start_elastic(slots=2, min_np=1, stderr=writer)
    first = job.wait_for(1, 2)
    os.kill(first[0]["pid"], signal.SIGKILL)  # of which the launcher has something to tell
    job.wait_for(2, 1)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    os.close(reader)
    os.close(writer)


def test_a_worker_that_hangs_is_killed(start_elastic):
    job = start_elastic(slots=2, min_np=1, hang_timeout_s=3)
    first = job.wait_for(1, 2)
    assert [float(place["hang_timeout"]) for place in first] == [3, 3]  # the limit of their steps, too
    os.kill(first[0]["pid"], signal.SIGSTOP)
    begin_s = time.monotonic()
    assert pids(job.wait_for(2, 1)) == pids(first)[1:]
    assert 2 < time.monotonic() - begin_s < 6
    wait_until(lambda: not Path(f"/proc/{first[0]['pid']}").exists())


def test_a_worker_that_is_busy_for_too_long_is_killed(start_elastic):
    job = start_elastic(slots=2, min_np=1)
    first = job.wait_for(1, 2)
    (job.out / "hang.1").touch()
    assert pids(job.wait_for(2, 1)) == pids(first)[:1]
    assert "60 s in phase step" in job.log()


def test_workers_come_and_go_with_the_hostfile(start_elastic):
    job = start_elastic(slots=2, min_np=1)
    first = job.wait_for(1, 2)
    job.hostfile.write_text("localhost slots=3\n")
    second = job.wait_for(2, 3)
    assert pids(second)[:2] == pids(first)
    job.hostfile.write_text("")  # an editor at work
    time.sleep(0.5)
    job.hostfile.write_text("localhost slots=1\n")
    third = job.wait_for(3, 1)
    assert pids(third) == pids(first)[:1]
    wait_until(lambda: not Path(f"/proc/{first[1]['pid']}").exists())
    assert job.process.poll() is None


def test_max_np_is_the_most(start_elastic):
    job = start_elastic(slots=3, min_np=1, max_np=2)
    first = job.wait_for(1, 2)
    os.kill(first[1]["pid"], signal.SIGKILL)
    begin_s = time.monotonic()
    job.wait_for(2, 1)
    third = job.wait_for(3, 2)
    assert time.monotonic() - begin_s < 8  # the third slot is free
    assert third[1]["worker"] == f"{os.uname().nodename}.2"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_request_to_stop_ends_the_job_with_75(start_elastic, number):
    job = start_elastic(slots=2, min_np=2)
    job.wait_for(1, 2)
    job.process.send_signal(number)
    assert job.wait() == 75
    assert not job.processes()


def test_a_request_to_stop_before_there_is_anything_to_save_is_75_too(start_elastic):
    job = start_elastic(slots=1, min_np=2)
    wait_until(lambda: list(job.out.glob("started.*")))
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert not job.processes()


def test_a_request_to_stop_while_workers_are_too_few(start_elastic):
    job = start_elastic(slots=2, min_np=2)
    first = job.wait_for(1, 2)
    os.kill(first[0]["pid"], signal.SIGKILL)
    wait_until(lambda: "--min-np" in job.log())
    assert not job.places(2)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 75
    (last,) = job.places(2)
    assert last["stop"]


def test_done_is_0(start_elastic):
    job = start_elastic(slots=2, min_np=2, plan="done")
    assert job.wait() == 0
    assert not job.processes()


def test_bad_input_ends_the_job_at_once(start_elastic):
    job = start_elastic(slots=2, min_np=1, plan="bad")
    assert job.wait() == 2
    assert not job.processes()


def test_a_worker_that_fails_is_replaced(start_elastic):
    job = start_elastic(slots=2, min_np=1)
    job.wait_for(1, 2)
    (job.out / "fail.0").touch()
    job.wait_for(2, 1)
    job.wait_for(3, 2)


def test_workers_that_all_fail_end_the_job(start_elastic):
    job = start_elastic(slots=2, min_np=1)
    job.wait_for(1, 2)
    for slot in range(2):
        (job.out / f"fail.{slot}").touch()
    assert job.wait() == 1


def test_memory_that_a_killed_agent_left_is_removed_by_the_next(start_elastic):
    job = start_elastic(slots=1, min_np=1)
    job.wait_for(1, 1)
    own = Path("/dev/shm") / f"{Path((job.out / 'folder').read_text()).name}-memory"
    left = own.with_name(f"horoyolo-job-{os.getpid()}-memory")
    (left / "slot-0").mkdir(parents=True)
    with kept_memory(own.with_name(f"horoyolo-job-{os.getpid()}x-memory")):
        assert not left.exists()
        assert (own / "slot-0" / "state").exists()  # its agent lives
    assert not own.with_name(f"horoyolo-job-{os.getpid()}x-memory").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_outlives_a_killed_launcher(start_elastic, stopped):
    job = start_elastic(slots=2, min_np=1)
    first = job.wait_for(1, 2)
    memory = Path("/dev/shm") / f"{Path((job.out / 'folder').read_text()).name}-memory"
    assert len(list(memory.glob("slot-*/state"))) == 2
    if stopped:
        os.kill(first[0]["pid"], signal.SIGSTOP)
    job.process.kill()
    wait_until(lambda: not job.processes())
    wait_until(lambda: not memory.exists())


def test_a_lost_agent_is_started_again(start_elastic):
    job = start_elastic(slots=2, min_np=1)
    first = job.wait_for(1, 2)
    (agent,) = [pid for pid in job.processes() if b"horoyolo.elastic.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(agent, signal.SIGKILL)
    second = job.wait_for(2, 2)
    assert not set(pids(first)) & set(pids(second))
    assert len(job.processes()) == 3  # the agent and two workers


@pytest.mark.parametrize("too_few", [False, True])
def test_a_job_that_stops_for_want_of_workers_tells_its_batch_script(too_few, monkeypatch, tmp_path):
    note = tmp_path / "too-few"
    monkeypatch.setenv("HOROYOLO_TOO_FEW", str(note))
    coordinator = Coordinator(Job(1, (), {}), Elastic(Limits(1), lambda: [Host("localhost", 1)], 60))
    coordinator.membership.too_few = too_few
    coordinator.membership.finished = Finish(75, "")
    with SignalLog() as signals:
        assert coordinator.run(signals) == 75
    coordinator.close()
    assert note.exists() == too_few
