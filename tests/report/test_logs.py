"""The log of a run: what its disk does not take is lost, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from horoyolo.report.logs import log_to_file, start_logs


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    log = logging.getLogger("horoyolo")
    yield log
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()


def test_a_full_disk_costs_lines_of_the_log(
    tmp_path: Path, log: logging.Logger, file_limit: Callable[[int], AbstractContextManager[None]], capsys: pytest.CaptureFixture[str]
) -> None:
    start_logs(rank=0, size=1)
    log_to_file(tmp_path, rank=0)
    log.info("before")
    with file_limit(100):
        for _ in range(5):
            log.info("lost")
        start_logs(rank=1, size=2)  # the next generation
        log_to_file(tmp_path, rank=1)
        log.info("lost")
    log.info("after")
    assert "before" in (tmp_path / "rank-0.log").read_text()
    assert "after" in (tmp_path / "rank-1.log").read_text()
    assert capsys.readouterr().err.count("rank-0.log: File too large; lines are missing there") == 1
