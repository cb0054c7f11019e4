"""The parts of the benches: sums by sockets, processes side by side, what is heard of them, where an exchange's time goes."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from horoyolo.bench import compression, talk, timing
from horoyolo.bench.compression import entry_comms, ratio_rate, summary
from horoyolo.bench.processes import Place, side_by_side
from horoyolo.bench.ring import SocketRing
from horoyolo.bench.timing import Costs, TimedCompressor
from horoyolo.bench.worker import WaitForAll
from horoyolo.launch.hosts import local_hosts
from horoyolo.launch.remote import LaunchError, Ssh
from horoyolo.model.yolo import build_model


class ThreadStarter:
    """A Starter whose processes are threads."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier):
        self.rank, self.hosts = rank, ["127.0.0.1"] * size
        self._board, self._barrier = board, barrier

    def allgather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(10)
        return list(self._board)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("numel", [1, 2, 7, 300_000])
def test_sockets_sum_over_the_ring(size: int, numel: int) -> None:
    board, barrier = [None] * size, threading.Barrier(size)

    def summed(rank: int) -> np.ndarray:
        ring = SocketRing(ThreadStarter(rank, size, board, barrier))
        values = np.arange(numel, dtype=np.float32) * (rank + 1)
        ring.allreduce(values)
        ring.allreduce(values)
        return values

    with ThreadPoolExecutor(size) as pool:
        for values in pool.map(summed, range(size)):
            np.testing.assert_array_equal(values, np.arange(numel, dtype=np.float32) * (size * (size + 1) // 2 * size))


def test_who_keeps_in_step_waits_for_the_slowest() -> None:
    board, barrier, arrived = [None] * 2, threading.Barrier(2), []

    def finish(rank: int) -> int:
        exchange = WaitForAll(ThreadStarter(rank, 2, board, barrier))
        exchange.arm()
        time.sleep(0.1 * rank)
        arrived.append(rank)
        exchange.finish()
        return len(arrived)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(finish, range(2))) == [2, 2]


def test_computing_is_measured_by_processes_in_step() -> None:
    parsed = argparse.Namespace(cfg="yolov5n", img=64, batch=1, steps=1)
    compute = compression.measure_compute(parsed, place(2), "fp32 NCHW")
    assert compute["gradient_bytes"] == 4 * sum(param.numel() for param in build_model("yolov5n", 80).parameters())
    assert 0 < compute["median_s"] < 60


def test_a_report_is_heard_behind_the_words_of_a_launcher() -> None:
    assert talk.heard('[0]<stdout>:horoyolo-bench: ["report", {"step_s": 0.5}]\n') == ("report", {"step_s": 0.5})
    assert talk.heard("[0]<stdout>:anything else\n") is None


def place(num_workers: int) -> Place:
    return Place(local_hosts(num_workers), "", Ssh())


def program(text: str) -> list[str]:
    return [sys.executable, "-c", f"import sys, time\nfrom horoyolo.bench.talk import Starter, report\nstarter = Starter()\n{text}"]


def test_processes_side_by_side_gather_and_report() -> None:
    where = place(3)
    reports = side_by_side(where, where.job(program("report([starter.rank, starter.allgather(starter.rank * 10), starter.hosts])")))
    assert reports == [[rank, [0, 10, 20], ["127.0.0.1"] * 3] for rank in range(3)]


def test_a_process_that_dies_ends_those_beside_it_and_says_why() -> None:
    where = place(2)
    text = "if starter.rank == 1: sys.exit('no memory left')\nstarter.allgather(0)\ntime.sleep(600)"
    with pytest.raises(LaunchError, match="no memory left"):
        side_by_side(where, where.job(program(text)))


def test_a_process_whose_starter_is_gone_ends() -> None:
    argv = program("report(0)\ntime.sleep(600)")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write('[0, ["127.0.0.1"]]\n')
        process.stdin.flush()
        assert talk.heard(process.stdout.readline()) == ("report", 0)
        process.stdin.close()
        assert process.wait(20) != 0


def test_peers_get_none_of_our_settings_of_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_FUSION_THRESHOLD", raising=False)
    ours, peer = place(2).job(["true"]).env, place(2).job(["true"], peer=True).env
    assert ours["HOROVOD_FUSION_THRESHOLD"] == "0"
    assert not [name for name in peer if name.startswith(("HOROVOD_", "OMPI_"))]
    assert ours["OMP_NUM_THREADS"] == peer["OMP_NUM_THREADS"] == "1"
    assert {name for name in ours if name.startswith("MALLOC_")} == {name for name in peer if name.startswith("MALLOC_")}


class Clock:
    """Time that passes when something is done."""

    now_s = 0.0

    def take(self, duration_s: float) -> None:
        self.now_s += duration_s

    def perf_counter(self) -> float:
        return self.now_s


class SlowComm:
    def __init__(self, clock: Clock):
        self._clock = clock

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce_async(self, tensor: torch.Tensor, name: str, op: str = "sum") -> Any:
        clock = self._clock

        class Handle:
            def wait(self) -> torch.Tensor:
                clock.take(100.0)
                return tensor

        return Handle()


class SlowCompressor:
    """Takes 1 s to encode, 10 s to decode half of the rounds, and two rounds."""

    def __init__(self, clock: Clock):
        self._clock = clock

    def start(self, bucket: Any, comm: Any) -> Any:
        clock = self._clock
        clock.take(1.0)
        handle = comm.allreduce_async(bucket, "first")

        class Pending:
            def proceed(self) -> None:
                handle.wait()
                clock.take(10.0)

            def finish(self) -> int:
                comm.allreduce_async(bucket, "second").wait()
                clock.take(10.0)
                return 7

        return Pending()

    def commit(self) -> None:
        pass


def test_waiting_is_neither_encoding_nor_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, costs = Clock(), Costs()
    monkeypatch.setattr(timing, "time", clock)
    compressor = TimedCompressor(SlowCompressor(clock), costs)
    for _ in range(3):
        pending = compressor.start(torch.zeros(1), SlowComm(clock))
        pending.proceed()
        assert pending.finish() == 7
        compressor.commit()
    assert costs.per_update() == {"encode_s": 1, "decode_s": 20, "wait_s": 200, "wire_bytes": 7}
    costs.clear()
    assert costs == Costs()


def test_an_entry_names_a_way_and_its_parameters() -> None:
    assert entry_comms("powersgd").powersgd_rank == 8
    comms = entry_comms("powersgd:powersgd_rank=2,bucket_mb=8")
    assert (comms.compression, comms.powersgd_rank, comms.bucket_mb) == ("powersgd", 2, 8)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_on_a_link_of_a_ratio_a_plain_sum_takes_as_many_times_the_compute_time(num_workers: int) -> None:
    compute = {"median_s": 0.25, "gradient_bytes": 28_900_000}
    rate = ratio_rate(4.0, compute, num_workers)
    assert rate.endswith("kbit")
    sent_bits = 2 * (num_workers - 1) / num_workers * 8 * 28_900_000
    assert sent_bits / (float(rate.removesuffix("kbit")) * 1e3) == pytest.approx(4 * 0.25, rel=1e-4)


def test_plain_is_the_quicker_of_ours_and_stock_and_ratios_are_paired() -> None:
    def row(*times: float) -> dict[str, list[float]]:
        return {"step_s": list(times)}

    figures = {"none": row(4, 8, 5), "stock Horovod, NCHW": row(3, 6, 4), "DDP, NCHW": row(1, 1, 1), "int8": row(1, 3, 1)}
    link = summary(figures, {"int8": {"error": 0.5}})
    assert link["plain"] == "stock Horovod, NCHW"
    assert link["rows"]["int8"]["rate_against_plain"] == 3
    assert link["rows"]["int8"]["error"] == 0.5


def test_jobs_beside_peers_go_on_counting_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draws the order of its rows by the number of its repeat."""
    jobs: list[list[str]] = []
    place = SimpleNamespace(nic="", hosts=[], job=lambda argv, peer=False: argv)
    monkeypatch.setattr(compression, "launched", lambda argv, *_: jobs.append(argv) or {"rows": {"none": {"step_s": [1.0]}}})
    parsed = argparse.Namespace(repeats=3, cfg="yolov5n", img=64, batch=2, steps=1, launcher="horovodrun")
    peer = compression.Peer("peer", ["peer"], "horovodrun")
    monkeypatch.setattr(compression.Peer, "run", lambda *_: {"step_s": 2.0})
    rows = compression.chosen_rows(["none"], ["no"])
    figures = compression.measure_link(parsed, place, rows, "fp32 NCHW", [peer], compression.Link("0"), with_errors=False).figures
    numbers = [(job[job.index("--repeats") + 1], job[job.index("--first-repeat") + 1]) for job in jobs]
    assert numbers == [("1", "0"), ("1", "1"), ("1", "2")]
    assert list(figures) == ["none", "peer"]  # whose turn came first in a repeat is no matter to the table
    assert figures["none"]["step_s"] == [1.0] * 3
    assert figures["peer"]["step_s"] == [2.0] * 3


def test_a_link_that_goes_by_computing_is_set_anew_for_each_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are on the link of their own repeat."""
    times_s, seen, rates = iter([0.5, 0.25]), [], []
    place = SimpleNamespace(nic="eth0", hosts=[], num_workers=2, job=lambda argv, peer=False: argv)

    @contextlib.contextmanager
    def shaped(place: Any, rate: str) -> Iterator[None]:
        rates.append(rate)
        yield
        rates.append("")

    monkeypatch.setattr(compression, "shaped", shaped)
    monkeypatch.setattr(compression, "measure_compute", lambda *_: {"median_s": next(times_s), "gradient_bytes": 1_000_000})
    monkeypatch.setattr(compression, "launched", lambda *_: seen.append(rates[-1]) or {"rows": {"none": {"step_s": [1.0]}}})
    parsed = argparse.Namespace(repeats=2, cfg="yolov5n", img=64, batch=2, steps=1, launcher="horovodrun")
    rows = compression.chosen_rows(["none"], ["no"])
    measured = compression.measure_link(parsed, place, rows, "fp32 NCHW", [], compression.Link("ratio 4", ratio=4.0), with_errors=False)
    assert seen == ["4000kbit", "8000kbit"]
    assert rates == ["4000kbit", "", "8000kbit", ""]
    assert measured.compute_s == [0.5, 0.25]
    assert measured.figures["none"]["step_s"] == [1.0] * 2
