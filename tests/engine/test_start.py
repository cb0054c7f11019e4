"""How a run begins and ends: its folder, made when it begins and needing no room later; what it says where its end was not written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from horoyolo.config import InputError
from horoyolo.elastic.member import Fixed
from horoyolo.engine.build import Training
from horoyolo.engine.checkpoint import newest_checkpoint, serialised, write_checkpoint
from horoyolo.engine.runs import Run
from horoyolo.engine.start import open_folder
from horoyolo.engine.train import Outcome, watched, what_is_lost, whole_state
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
        assert "no diagnosis: " in caplog.text
        (job.run.folder / "config.yaml").unlink()
        open_folder(job, begins=False)
    assert f"run folder {job.run.folder}: File too large" in caplog.text
    assert "training goes on" in caplog.text


def test_a_run_without_a_folder_does_not_begin(open_job: Callable[..., Training], file_limit: Limit) -> None:
    job = open_job()
    job.run = Run(job.run.folder / "new")
    with file_limit(0), pytest.raises(InputError, match=r"run folder .*/new: File too large .*a disk with room"):
        open_folder(job, begins=True)
    assert not job.run.folder.exists()


def test_what_was_left_goes_when_the_run_begins_and_not_later(open_job: Callable[..., Training]) -> None:
    job = open_job()
    left = [job.run.folder / "STOP", job.run.checkpoints / ".step-00000001.rank-3-of-4.pt.abc.tmp", job.run.folder / ".metrics.json.abc.tmp"]
    for path in left:
        path.touch()
    open_folder(job, begins=False)
    assert all(path.exists() for path in left)
    open_folder(job, begins=True)
    assert not any(path.exists() for path in left)


def test_the_end_of_training_has_the_time_of_a_checkpoint_not_of_a_step(open_job: Callable[..., Training]) -> None:
    """A worker that writes its last checkpoint to a slow disk would be taken for one that hangs, and killed."""
    job = open_job()
    phases = ["step"]

    class Noting(Fixed):
        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            phases.append(name)
            yield
            phases.pop()

    seen = []
    job.member = Noting()
    job.background.start("slow", lambda: None)
    job.background.wait, wait = (lambda: seen.append(phases[-1]) or wait()), job.background.wait  # type: ignore[func-returns-value, method-assign]
    with watched(job, []):
        seen.append(phases[-1])
    assert seen == ["step", "other"]


def test_another_run_s_checkpoints_are_set_aside_when_a_run_begins_in_its_folder(
    open_job: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    """A resume would take them for its own: they are further. Those of the run itself stay when it is resumed."""
    job = open_job()
    old = write_checkpoint(job.run.checkpoints, serialised({"step": 2600}), 2600, keep=1, notes={})
    job.progress.step = 7
    open_folder(job, begins=True)
    assert old.exists()
    job.progress.step = 0
    for _ in range(2):
        open_folder(job, begins=True)
        assert list(job.run.checkpoints.iterdir()) == []
        assert (job.run.folder / "checkpoints-before" / old.name).exists()
    assert caplog.text.count("set aside as checkpoints-before") == 1


@pytest.mark.parametrize("before", [False, True])
def test_a_stop_without_a_checkpoint_is_a_failure_that_says_what_there_is(open_job: Callable[..., Training], file_limit: Limit, before: bool) -> None:
    job = open_job()
    if before:
        job.save_checkpoint(whole_state(job))
        job.background.wait()
        job.progress.step = 4
    assert what_is_lost(job, Outcome.STOPPED) == ""
    with file_limit(1000), watched(job, []):
        job.save_weights(job.model, 0, None, is_best=False)
        job.save_checkpoint(whole_state(job))
    lost, step = what_is_lost(job, Outcome.STOPPED), job.progress.step
    assert lost.startswith(f"stopped after step {step}, but not written: checkpoint of step {step}; ")
    assert lost.endswith(f"is {job.run.checkpoints / 'step-00000000.pt'}" if before else f"there is none in {job.run.checkpoints}")
    job.save_checkpoint(whole_state(job))
    job.background.wait()
    assert what_is_lost(job, Outcome.STOPPED) == ""
    assert "not written: weights of epoch 1; " in what_is_lost(job, Outcome.DONE)
    job.save_weights(job.model, 1, None, is_best=False)
    assert what_is_lost(job, Outcome.DONE) == ""


def test_a_checkpoint_does_not_wait_for_what_is_the_worker_s_own(open_job: Callable[..., Training], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    job = open_job()
    monkeypatch.setattr("horoyolo.engine.build.write_rank_state", fail)
    monkeypatch.setattr(job.comm, "size", lambda: 2)
    job.save_checkpoint(job.state.state_dict())
    job.background.wait()
    assert newest_checkpoint(job.run.checkpoints) is not None
    assert not job.unwritten


@pytest.mark.parametrize(
    ("error", "status", "told"), [("OSError(28, 'No space')", 1, "OSError: [Errno 28] No space"), ("InputError('bad')", 2, "error: bad")]
)
def test_a_worker_of_an_elastic_job_that_fails_ends_at_once(tmp_path: Path, error: str, status: int, told: str) -> None:
    """As long as Horovod's own end may take: it waits for workers that don't answer."""
    program = (
        "import atexit, sys, time; from horoyolo.cli import main; from horoyolo.config import InputError; from horoyolo.engine import start\n"
        "def fail(*args, **options):\n"
        f"    atexit.register(time.sleep, 600); raise {error}\n"
        "start.start_training = fail\n"
        "sys.exit(main(['train', '--data', 'd.yaml', '--cfg', 'yolov5n', '--elastic']))"
    )
    env = os.environ | {"HOROYOLO_ELASTIC_FD": "0", "HOROYOLO_STATUS_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    assert told in done.stderr
    assert [path.read_text() for path in tmp_path.glob("status.*")] == [str(status)]
