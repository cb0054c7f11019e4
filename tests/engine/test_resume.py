"""A run that was stopped and resumed on as many workers ends with the same bits as one that was not, whatever the compression."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resize_worker import STEPS_AFTER, STOP_AT
from resume_worker import COMPRESSIONS, EPOCHS, StopAt
from small_run import build_job

from horoyolo.compression.build import COMPRESSORS
from horoyolo.config import Comms, InputError
from horoyolo.distributed.comm import LocalComm
from horoyolo.engine.build import CompressorState, Training, pick_compressor
from horoyolo.engine.checkpoint import newest_checkpoint, read_checkpoint, serialised, write_checkpoint
from horoyolo.engine.commit import copied, local_state
from horoyolo.engine.device import numerics_for
from horoyolo.engine.stop import StopRequest
from horoyolo.engine.train import train, watched


def differences(left: Any, right: Any, name: str = "") -> list[str]:
    """Names of what differs by a bit."""
    if isinstance(left, torch.Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [name]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{name}: {sorted(map(str, left.keys() ^ right.keys()))}"]
        return [found for key in left for found in differences(left[key], right[key], f"{name}.{key}".strip("."))]
    if isinstance(left, (list, tuple)):
        return [found for index, pair in enumerate(zip(left, right, strict=True)) for found in differences(*pair, f"{name}.{index}")]
    return [] if left == right else [f"{name}: {left} {right}"]


@pytest.fixture(scope="module")
def ends(run_workers: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return run_workers(Path(__file__).parent / "resume_worker.py", 2, timeout_s=570)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_two_workers_end_with_the_same_bits(ends: list[dict[str, Any]], compression: str) -> None:
    for end in ends:
        found = end[compression]
        assert not found["stopped"]
        assert found["done"]
        assert differences(found["whole"], found["resumed"]) == []
    assert ends[0][compression]["whole"]["shared"]["progress"]["step"] == 4 * EPOCHS


@pytest.fixture(scope="module")
def resized(run_workers: Callable[..., list[dict[str, Any]]]) -> dict[str, dict[int, list[float]]]:
    return run_workers(Path(__file__).parent / "resize_worker.py", 2, timeout_s=300)[0]


@pytest.mark.parametrize("run", ["one then two", "two then one"])
def test_another_number_of_workers_goes_on_with_the_same_losses(resized: dict[str, dict[int, list[float]]], run: str) -> None:
    assert sorted(resized[run]) == list(range(STOP_AT + 1, STOP_AT + 1 + STEPS_AFTER))
    for step, losses in resized[run].items():
        assert losses == pytest.approx(resized["whole"][step], rel=1e-6), step


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_one_worker_ends_with_the_same_bits(tiny: Path, tmp_path: Path, stop_at: int) -> None:
    """Within an epoch, at its end, where it was asked before its last step, and after."""

    def run(name: str, stop: Callable[[Training], StopRequest]) -> Training:
        job = build_job(tiny, tmp_path, LocalComm(), name=name, epochs=EPOCHS)
        with watched(job, []):
            train(job, [], stop(job))
        return job

    class StopAtOnce(StopAt):
        pending = property(lambda self: self._job.progress.step + 1 == self._step)  # type: ignore[assignment]

    whole = run("whole", lambda job: StopRequest())
    stopped = run("stopped", lambda job: StopAtOnce(job, stop_at))
    assert stopped.progress.step == stop_at
    resumed = run("stopped", lambda job: StopRequest())
    assert differences(copied(local_state(whole)), copied(local_state(resumed))) == []


def test_checkpoints_are_written_within_an_epoch_by_the_clock(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_job(tiny, tmp_path, LocalComm(), epochs=1, keep_checkpoints=9, checkpoint_minutes=2)
    clock_s = 0.0

    class Later(StopRequest):
        @property
        def pending(self) -> bool:
            nonlocal clock_s
            clock_s += 50
            job.background.wait()
            return False

    monkeypatch.setattr("horoyolo.engine.build.time", SimpleNamespace(monotonic=lambda: clock_s))  # there alone: other threads live by the clock
    job.saved_s = clock_s
    with watched(job, []):
        train(job, [], Later())
    names = sorted(path.name for path in job.run.checkpoints.glob("*.pt"))
    assert names == ["step-00000003.pt", "step-00000004.pt"]  # after 150 s, and the end of the epoch
    path = newest_checkpoint(job.run.checkpoints)
    assert path is not None


def test_a_checkpoint_of_another_version_is_refused_with_a_way_on(tiny: Path, tmp_path: Path) -> None:
    job = build_job(tiny, tmp_path, LocalComm(), epochs=1)
    with watched(job, []):
        train(job, [], StopRequest())
    path = newest_checkpoint(job.run.checkpoints)
    assert path is not None
    state = read_checkpoint(path)
    del state["ledger"]
    write_checkpoint(job.run.checkpoints, serialised(state), job.progress.step + 1, keep=1, notes={})
    with pytest.raises(InputError, match=r"of another version of horoyolo: it has no ledger; .*--weights .*last\.pt"):
        build_job(tiny, tmp_path, LocalComm(), epochs=2)


WAYS = {"measured": {}, "during": {"overlap": "yes"}, "after": {"overlap": "no"}, "synchronised": {"sync_bn": True}}


def compressor_state(entry: str, **comms: Any) -> CompressorState:
    numerics = numerics_for(torch.device("cpu"), "fp32")
    return CompressorState(entry, pick_compressor(torch.nn.Conv2d(3, 4, 1), Comms(compression=entry, **comms), numerics))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("entry", COMPRESSORS)
def test_a_compressors_state_serves_wherever_buckets_leave(entry: str, way: str) -> None:
    """When they leave is measured on CPUs, and is a matter of devices and settings that a run may be resumed with."""
    lossy = COMPRESSORS[entry].make(Comms())
    for _ in range(5):
        lossy.commit()
    kept = lossy.state_dict()
    for other in WAYS.values():
        taken = compressor_state(entry, **other)
        taken.load_state_dict({"settings": entry, "state": kept})
        assert differences(taken.state_dict()["state"], kept) == []
        went_on = compressor_state(entry, **WAYS[way])
        went_on.load_state_dict(taken.state_dict())
        assert differences(went_on.state_dict(), taken.state_dict()) == []
