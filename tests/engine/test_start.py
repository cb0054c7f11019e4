"""The folder of a run: made when it begins; nothing that comes later needs room on its disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from horoyolo.config import InputError
from horoyolo.engine.build import Training
from horoyolo.engine.runs import Run
from horoyolo.engine.start import open_folder
from horoyolo.engine.watch import build_hooks

Limit = Callable[[int], AbstractContextManager[None]]


@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's own
def test_a_new_rank_0_needs_no_room(open_job: Callable[..., Training], file_limit: Limit, caplog: pytest.LogCaptureFixture) -> None:
    job = open_job()
    with file_limit(0):
        open_folder(job, begins=False)
        for hook in build_hooks(job):
            hook.before_train()
            hook.after_train()
        assert "NOT" not in caplog.text
        (job.run.folder / "config.yaml").unlink()
        open_folder(job, begins=False)
    assert f"run folder {job.run.folder}: File too large" in caplog.text
    assert "training goes on" in caplog.text


def test_a_run_without_a_folder_does_not_begin(open_job: Callable[..., Training], file_limit: Limit) -> None:
    job = open_job()
    job.run = Run(job.run.folder / "new")
    with file_limit(0), pytest.raises(InputError, match=r"run folder .*/new: File too large .*a disk with room"):
        open_folder(job, begins=True)


def test_what_was_left_goes_when_the_run_begins_and_not_later(open_job: Callable[..., Training]) -> None:
    job = open_job()
    left = [job.run.folder / "STOP", job.run.checkpoints / ".step-00000001.rank-3-of-4.pt.abc.tmp", job.run.folder / ".metrics.json.abc.tmp"]
    for path in left:
        path.touch()
    open_folder(job, begins=False)
    assert all(path.exists() for path in left)
    open_folder(job, begins=True)
    assert not any(path.exists() for path in left)
