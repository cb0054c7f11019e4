"""Images that vanish while a run lasts: all workers know the same, and a run with too many ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from horoyolo.config import InputError
from horoyolo.data.scan import ScanReport
from horoyolo.engine.build import Training
from horoyolo.engine.checkpoint import newest_checkpoint, read_checkpoint
from horoyolo.engine.state import TrainingError
from horoyolo.engine.stop import StopRequest
from horoyolo.engine.train import train, watched
from horoyolo.engine.unreadable import Unreadable, check_share


class Told:
    """A worker that hears what the others met."""

    def __init__(self, rank: int, others: list[str]) -> None:
        self._rank, self._others = rank, others

    def rank(self) -> int:
        return self._rank

    def allgather_object(self, value: Any) -> list[Any]:
        return [value, self._others] if self._rank == 0 else [self._others, value]


def test_all_workers_come_to_know_the_same(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Unreadable(), Unreadable()
    assert first.has_news(["a", "b"])
    assert not second.has_news([])
    with caplog.at_level(logging.WARNING, "horoyolo"):
        first.agree(["b", "a", "a"], Told(0, ["c"]))  # type: ignore[arg-type]
        second.agree(["c"], Told(1, ["a", "b"]))  # type: ignore[arg-type]
    assert first.files == second.files == {"a", "b", "c"}
    assert [record.getMessage() for record in caplog.records] == ["3 images can't be read any more and are shown as grey, without boxes: a, b, c"]
    assert not second.has_news(["a"])
    third = Unreadable()
    third.load_state_dict(first.state_dict())
    assert third.files == first.files


def test_too_many_bad_images_or_labels_are_refused_before_the_start() -> None:
    report = ScanReport("train", images=18, corrupt_images=["x.jpg"], corrupt=["y.txt:1 (not a number)", "y.txt:2 (not a number)"])
    check_share(report, 2 / 19)
    with pytest.raises(InputError, match=r"train: 2 of 19 images or their labels are corrupt \(x.jpg, y.txt\); max_bad_share = 0.1"):
        check_share(report, 0.1)


def test_label_files_that_can_not_be_read_count_each() -> None:
    denied = [f"labels/{number}.txt (Permission denied)" for number in range(9)]
    with pytest.raises(InputError, match=r"9 of 10 images or their labels are corrupt \(labels/0.txt, "):
        check_share(ScanReport("train", images=10, corrupt=[*denied, "labels/8.txt:3 (not five numbers)"]), 0.5)


def test_names_with_parentheses_count_each() -> None:
    corrupt = [f"labels/img ({number}).txt:1 (not five numbers)" for number in range(9)]
    with pytest.raises(InputError, match=r"9 of 10 images or their labels are corrupt \(labels/img \(0\).txt, "):
        check_share(ScanReport("train", images=10, corrupt=[*corrupt, "labels/img (8).txt:3 (not five numbers)"]), 0.5)


def test_images_that_vanish_are_named_and_too_many_end_the_run(open_job: Callable[..., Training], caplog: pytest.LogCaptureFixture) -> None:
    """One goes at the start of each epoch but the first; the third is one too many of eight."""
    job = open_job(epochs=4, max_bad_share=0.3, evaluate_every=9, **{"hyp.mosaic": 0})
    images = job.train_split.image_paths
    kept = {path: path.read_bytes() for path in images[:3]}

    class Vanishing(StopRequest):
        @property
        def pending(self) -> bool:
            if job.progress.step in (4, 8, 12):
                images[job.progress.step // 4 - 1].unlink()
            return False

    try:
        refused = pytest.raises(TrainingError, match="3 images can't be read any more, of 8")
        with caplog.at_level(logging.WARNING, "horoyolo"), refused, watched(job, []):
            train(job, [], Vanishing())
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert caplog.text.count("1 images can't be read any more") == 3
    path = newest_checkpoint(job.run.checkpoints)
    assert path is not None
    state = read_checkpoint(path)
    assert state["progress"]["step"] == job.progress.step > 12
    assert len(state["unreadable"]["files"]) == 3
    assert open_job().unreadable.files == set()  # mended: the run goes on
