"""The parts of ``bench elastic``: what is seen of steps, what counts as going on, how kills are put together."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from horoyolo import cli
from horoyolo.bench.elastic import _next, recovery_row
from horoyolo.bench.hand import workers
from horoyolo.bench.record import Record, RowFile, Seen
from horoyolo.bench.systems import System
from horoyolo.launch.remote import LaunchError

BEFORE = [Seen(1, 3, "node1 7"), Seen(1, 3, "node2 8"), Seen(2, 3, "node1 7")]


def system(restarts: bool) -> System:
    return System("any", (), lambda place, mark: [], Record(Path("rows.csv")), restarts)


def test_rows_are_seen_when_they_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = RowFile(str(path))
    rows.add(1, 0, 3, "node1", 7, 0.5)
    with path.open("a") as stream:
        stream.write("2,0,3,no")
    assert Record(path).steps() == [Seen(1, 3, "node1 7")]


def test_steps_csv_has_a_head_and_no_processes(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text("step,epoch,workers\n1,0,2\n")
    assert Record(path, 2, ()).steps() == [Seen(1, 2, "")]


def test_a_step_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    record = Record(tmp_path / "rows.csv")
    with pytest.raises(LaunchError, match="no such step"):
        record.wait(lambda steps: None, lambda: None, 0.05)
    RowFile(str(record.path)).add(4, 0, 2, "node1", 7, 0.5)
    step, _ = record.wait(lambda steps: steps[0], lambda: None, 5)
    assert step.step == 4


@pytest.mark.parametrize(
    ("restarts", "later", "found"),
    [
        (False, [Seen(3, 3, "node1 7")], None),  # completed before the kill was noticed
        (False, [Seen(3, 3, "node1 7"), Seen(4, 2, "node1 7")], Seen(4, 2, "node1 7")),
        (True, [Seen(3, 3, "node2 8")], None),
        (True, [Seen(3, 3, "node2 8"), Seen(1, 3, "node1 9")], Seen(1, 3, "node1 9")),
    ],
)
def test_going_on_is_a_step_without_the_dead(restarts: bool, later: list[Seen], found: Seen | None) -> None:
    assert _next(system(restarts), BEFORE, later, 3) == found


def test_a_kill_that_nobody_got_over_counts_as_endless() -> None:
    kills = [{"seconds": seconds, "repeated_steps": again} for seconds, again in ((0.5, 0), (None, None), (0.7, 2))]
    row = recovery_row(kills)
    assert (row["median_s"], row["min_s"], row["max_s"], row["never"], row["repeated_steps"]) == (0.7, 0.5, None, 1, 2)
    assert not math.isinf(row["median_s"])


def test_workers_are_found_by_their_words_and_without_what_they_forked() -> None:
    program = "import os, time; os.fork(); print(1, flush=True); time.sleep(60)"
    words = [sys.executable, "-c", program, f"mark-{os.getpid()}"]
    with subprocess.Popen([words[0], "-u", *words[1:]], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        assert process.stdout.readline()
        assert process.stdout.readline()
        try:
            assert workers(words) == [process.pid]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.read()  # to its end: both are gone
    assert workers(words) == []


def test_peers_need_hosts_of_one_worker_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "elastic", "--peers", "stock"]) == 2
    assert "--hosts" in capsys.readouterr().err
