"""Workers as threads of one process: one misses the end of an update that the other completes, then a newcomer joins them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from board import TIMEOUT_S, Board, BoardComm, together

from horoyolo.config import AgreedError, Config, InputError, override
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.data.synthetic import write_synthetic
from horoyolo.distributed.comm import Comm, CommBroken, LocalComm
from horoyolo.elastic.member import KnownRun
from horoyolo.engine.build import Training, build_model_for, build_training
from horoyolo.engine.commit import copied, local_state, restore
from horoyolo.engine.device import numerics_for
from horoyolo.engine.generations import RUN_NOTE, end_in_order, keep, recall
from horoyolo.engine.state import Position
from horoyolo.engine.synchronise import check_agreement, claim_of, synchronise
from horoyolo.engine.train import train_step, whole_state
from horoyolo.engine.transfer import fingerprint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(folder, 20, seed=0)
    return folder / "data.yaml"


def config_for(data: Path, project: Path, **values: object) -> Config:
    given = {"data": str(data), "cfg": "yolov5n", "img": 64, "batch": 4, "project": str(project), "device": "cpu", "precision": "fp32", "workers": 0}
    return override(Config(), given | {"optim.nominal_batch": 0, "comms.overlap": "no", "recipe.autoanchor": False} | values, "test")


def build(config: Config, comm: Comm, precision: str = "fp32") -> Training:
    spec = load_data_spec(config.data)
    splits = scan_split(spec, "train"), scan_split(spec, "val")
    numerics = numerics_for(torch.device("cpu"), precision)
    return build_training(config, comm, numerics, build_model_for(config, spec.classes), *splits, num_local=1)


def meet(jobs: list[Training], known: KnownRun | None = None) -> None:
    board = Board(len(jobs))
    for rank, job in enumerate(jobs):
        job.comm.sit_at(board, rank)  # type: ignore[attr-defined]
    together([lambda job=job: synchronise(job, known) for job in jobs])


def step(jobs: list[Training], deaf: Training | None = None, deaf_to: str = "bucket.1") -> None:
    """One global batch on all; ``deaf`` does not hear how the exchange ended."""

    def one(job: Training) -> None:
        batch = next(iter(job.loader))
        if job is not deaf:
            train_step(job, batch, 0.0, stop_pending=False)
            return
        job.comm.deaf_to = deaf_to  # type: ignore[attr-defined]
        with pytest.raises(CommBroken):
            train_step(job, batch, 0.0, stop_pending=False)
        job.comm.deaf_to = "nothing"  # type: ignore[attr-defined]

    together([lambda job=job: one(job) for job in jobs])


def shared(job: Training) -> str:
    state = job.state.state_dict()
    del state["ema"]["model"]
    state["model"] = dict(job.model.named_parameters())
    return fingerprint([state | {"optimizer": state["optimizer"]["state"]}, dict(job.ema.model.named_parameters())])


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_an_update_that_one_survivor_completed_is_kept_by_all(data: Path, tmp_path: Path, compression: str) -> None:
    config = config_for(data, tmp_path, **{"comms.compression": compression})
    pairs = [[build(config, BoardComm()) for _ in range(2)] for _ in range(2)]
    for jobs in pairs:
        meet(jobs)
        step(jobs)
    (first, second), undisturbed = pairs
    step(undisturbed)
    # It has sent all of its own when it waits for the last sums of the second bucket.
    step([first, second], deaf=second, deaf_to="bucket.1.sums" if compression == "int8" else "bucket.1")
    assert (first.progress.step, second.progress.step) == (2, 1)

    newcomer = build(config, BoardComm())
    meet([second, newcomer, first])  # who is furthest need not be rank 0
    assert [job.standing.position for job in (first, second, newcomer)] == [first.standing.position] * 3
    assert len({shared(job) for job in (first, second, newcomer, *undisturbed)}) == 1
    for mine, expected in zip((first, second), undisturbed, strict=True):
        assert fingerprint(mine.rank_state()["residuals"]) == fingerprint(expected.rank_state()["residuals"])
        assert fingerprint(mine.rank_state()["buffers"]) == fingerprint(expected.rank_state()["buffers"])
    assert not newcomer.rank_state()["residuals"]
    assert fingerprint(newcomer.rank_state()["buffers"]) == fingerprint(first.rank_state()["buffers"])
    assert newcomer.run == first.run
    step([second, newcomer, first])
    assert len({shared(job) for job in (first, second, newcomer)}) == 1


def test_an_update_that_others_left_out_leaves_no_trace_where_it_failed(data: Path, tmp_path: Path) -> None:
    """NaN in the images of a worker that does not hear how the exchange ended: the others skipped it, with the statistics of its images."""
    config = config_for(data, tmp_path)
    first, second = jobs = [build(config, BoardComm()) for _ in range(2)]
    meet(jobs)
    step(jobs)
    before = fingerprint(second.rank_state()["buffers"])
    nan = second.model.register_forward_pre_hook(lambda model, images: (images[0] * float("nan"),))
    step(jobs, deaf=second)
    nan.remove()
    assert first.progress.skipped_updates == 1
    assert not all(buffer.isfinite().all() for buffer in second.model.buffers())
    meet(jobs)
    assert (second.progress.step, second.progress.skipped_updates) == (2, 1)
    assert fingerprint(second.rank_state()["buffers"]) == before
    step(jobs)
    assert first.progress.skipped_updates == 0
    assert shared(first) == shared(second)


@pytest.mark.parametrize("deaf_to", ["step.ahead", "step.losses", "bucket.0"])
def test_an_update_that_no_survivor_completed_is_done_again(data: Path, tmp_path: Path, deaf_to: str) -> None:
    """The accumulation before it, too: everything is as after the last update, on both."""
    config = config_for(data, tmp_path, **{"optim.nominal_batch": 8, "hyp.warmup_epochs": 0.0, "comms.compression": "int8"})
    jobs = [build(config, BoardComm()) for _ in range(2)]
    meet(jobs)
    for _ in range(3):
        step(jobs)
    before = [(job.standing.position, job.standing.update, fingerprint(job.rank_state()["residuals"])) for job in jobs]
    batches = [next(iter(job.loader)) for job in jobs]

    def broken(job: Training, batch: Any) -> None:
        job.comm.deaf_to = deaf_to  # type: ignore[attr-defined]
        with pytest.raises(CommBroken):
            train_step(job, batch, 0.0, stop_pending=False)
        job.comm.deaf_to = "nothing"  # type: ignore[attr-defined]

    together([lambda job=job, batch=batch: broken(job, batch) for job, batch in zip(jobs, batches, strict=True)])
    meet(jobs)
    for job, (position, update, residuals) in zip(jobs, before, strict=True):
        assert job.standing.position == position
        assert (job.progress.step, job.progress.update) == (2, update)
        assert job.sampler.consumed == 8
        assert fingerprint(job.rank_state()["residuals"]) == residuals
        assert all(param.grad is None for param in job.model.parameters())
    assert shared(jobs[0]) == shared(jobs[1])
    step(jobs)
    assert shared(jobs[0]) == shared(jobs[1])


def test_who_takes_the_slot_of_a_worker_that_has_left_does_not_find_what_that_handed_over(data: Path, tmp_path: Path) -> None:
    config = config_for(data, tmp_path / "runs", **{"comms.compression": "int8"})
    members = [SimpleNamespace(wait_change=lambda: None, leaving=leaving, memory=tmp_path / f"slot-{leaving:d}") for leaving in (False, True)]
    jobs = [build(config, BoardComm()) for _ in members]
    for job, member in zip(jobs, members, strict=True):
        recall(job, member.memory)
    meet(jobs)
    for job, member in zip(jobs, members, strict=True):
        member.memory.mkdir()
        (member.memory / RUN_NOTE).write_text(str(job.run.folder))
    step(jobs)
    for job, member in zip(jobs, members, strict=True):
        keep(job, member.memory)
    residuals = [job.rank_state()["residuals"] for job in jobs]
    together([lambda job=job, member=member: end_in_order(job, member) for job, member in zip(jobs, members, strict=True)])
    newcomer = build(config, BoardComm())
    recall(newcomer, members[1].memory)
    assert newcomer.standing.position == jobs[0].standing.position
    assert not newcomer.rank_state()["residuals"]
    for name, sum_ in jobs[0].rank_state()["residuals"].items():
        torch.testing.assert_close(sum_, residuals[0][name] + residuals[1][name])


def test_a_newcomer_with_other_settings_is_turned_away(data: Path, tmp_path: Path) -> None:
    running = build(config_for(data, tmp_path), BoardComm())
    meet([running])
    other = build(config_for(data, tmp_path, seed=1), BoardComm())
    board = Board(2)
    for rank, job in enumerate((running, other)):
        job.comm.sit_at(board, rank)  # type: ignore[attr-defined]
    running.comm.deaf_to = "broadcast_object"  # type: ignore[attr-defined]  # the newcomer ends, so that the next collective fails
    with pytest.raises(InputError, match=r"settings on .* differ .*: seed"), ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(synchronise, job) for job in (running, other)]
        with pytest.raises(CommBroken):
            futures[0].result(TIMEOUT_S)
        futures[1].result(TIMEOUT_S)


def test_workers_that_compute_in_different_precisions_are_told_at_the_start(data: Path, tmp_path: Path) -> None:
    """``auto`` is what a machine has: workers that differ would have different collectives."""
    config = config_for(data, tmp_path, precision="auto")
    with pytest.raises(AgreedError, match=r"computes on cpu in bfloat16, .* on cpu in float32: name what all have by --device and --precision"):
        meet([build(config, BoardComm()), build(config, BoardComm(), "bf16")])
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_nccl_is_to_have_for_one_worker_is_for_one(data: Path, tmp_path: Path) -> None:
    told = claim_of(build(config_for(data, tmp_path), LocalComm()))
    claims = [replace(told, gpu=gpu, host=host) for gpu, host in (("GPU-1", "a"), ("GPU-2", "a"), ("GPU-3", "b"))]
    check_agreement(claims, rank=0, root=0)
    twice = [*claims, replace(told, gpu="GPU-3", host="b")]
    for rank in range(4):
        with pytest.raises(AgreedError, match="2 workers on b have the same GPU"):
            check_agreement(twice, rank, root=0)
    running = [replace(claim, position=Position(0, 4, 0), survived=True) for claim in twice[:3]]
    for rank in range(3):
        check_agreement([*running, twice[3]], rank, root=0)  # the newcomer leaves, not they
    with pytest.raises(InputError, match="2 workers on b have the same GPU"):
        check_agreement([*running, twice[3]], rank=3, root=0)


def save(job: Training) -> None:
    job.save_checkpoint(whole_state(job))
    job.background.wait()


def test_newcomers_alone_go_on_from_the_newest_checkpoint(data: Path, tmp_path: Path, caplog: Any) -> None:
    """Not in a new folder and not from the start, though the settings say so."""
    config = config_for(data, tmp_path, exist_ok=True)
    (gone,) = jobs = [build(config, BoardComm())]
    meet(jobs)
    folder = gone.run.folder
    step(jobs)
    step(jobs)
    save(gone)
    kept = shared(gone)
    step(jobs)
    newcomers = [build(config, BoardComm()) for _ in range(2)]
    caplog.set_level("INFO", logger="horoyolo")
    meet(newcomers, KnownRun(folder, 3))
    assert {job.progress.step for job in newcomers} == {2}
    assert {shared(job) for job in newcomers} == {kept}
    assert {job.run.folder for job in newcomers} == {folder}
    assert "goes on from the checkpoint of step 2; 1 completed steps are lost" in caplog.text
    step(newcomers)
    assert len({shared(job) for job in newcomers}) == 1


def test_newcomers_alone_without_a_checkpoint_begin_anew_in_the_same_folder(data: Path, tmp_path: Path, caplog: Any) -> None:
    config = config_for(data, tmp_path)
    folder = tmp_path / config.name
    folder.mkdir()
    newcomers = [build(config, BoardComm()) for _ in range(2)]
    caplog.set_level("INFO", logger="horoyolo")
    meet(newcomers, KnownRun(folder, 7))
    assert {(job.run.folder, job.progress.step) for job in newcomers} == {(folder, 0)}
    assert "goes on from the START, without a checkpoint; 7 completed steps are lost" in caplog.text


@pytest.mark.parametrize("copied_at", [1, 3])
def test_of_a_copy_and_a_checkpoint_the_newer_one_is_taken(data: Path, tmp_path: Path, copied_at: int, caplog: Any) -> None:
    config = config_for(data, tmp_path, **{"comms.compression": "int8"})
    gone = [build(config, BoardComm()) for _ in range(2)]
    meet(gone)
    kept: list[Any] = []
    residuals: dict[int, list[str]] = {}
    for number in (1, 2, 3):
        step(gone)
        residuals[number] = [fingerprint(job.rank_state()["residuals"]) for job in gone]
        if number == 2:
            together([lambda job=job: save(job) for job in gone])
        if number == copied_at:
            kept = [copied(local_state(job)) for job in gone]
    again = [build(config, BoardComm()) for _ in range(2)]
    for job, state in zip(again, kept, strict=True):
        restore(job, state)
        job.run, job.begun, job.recalled = gone[0].run, True, True
        job.standing.mark()
    caplog.set_level("INFO", logger="horoyolo")
    meet(again, KnownRun(gone[0].run.folder, 3))
    assert {job.progress.step for job in again} == {max(copied_at, 2)}
    whence = "copy in memory of step 3; 0" if copied_at == 3 else "checkpoint of step 2; 1"
    assert f"goes on from the {whence} completed steps are lost" in caplog.text
    assert [fingerprint(job.rank_state()["residuals"]) for job in again] == residuals[max(copied_at, 2)]


def test_what_a_worker_saved_on_another_course_of_the_run_is_left_alone(data: Path, tmp_path: Path, caplog: Any) -> None:
    """Two workers come to step 2; one goes on from step 1 and comes to another step 2; two resume that."""
    values = {"comms.compression": "int8", "name": "run", "keep_checkpoints": 3}
    config = config_for(data, tmp_path, **values)
    first = [build(config, BoardComm()) for _ in range(2)]
    meet(first)
    folder = first[0].run.folder
    first[0].run.create(config)
    for _ in range(2):
        step(first)
        together([lambda job=job: save(job) for job in first])
    resumed = replace(config, resume=str(folder / "checkpoints" / "step-00000001.pt"))
    other = [build(replace(resumed, recipe=replace(config.recipe, box_loss="giou")), BoardComm())]
    meet(other)
    step(other)
    save(other[0])
    assert (folder / "checkpoints" / "step-00000002.rank-1-of-2.pt").exists()

    again = [build(replace(config, resume=str(folder)), BoardComm()) for _ in range(2)]
    caplog.set_level("INFO", logger="horoyolo")
    meet(again)
    assert shared(again[0]) == shared(other[0])
    assert "what this worker saved of its own at step 2 is of another course of the run" in caplog.text
    assert not again[1].rank_state()["residuals"]

    caplog.clear()
    whole = [build(replace(resumed, name="x"), BoardComm()) for _ in range(2)]
    meet(whole)
    assert whole[1].rank_state()["residuals"]
    assert "another course" not in caplog.text


def test_a_survivor_goes_before_a_checkpoint(data: Path, tmp_path: Path) -> None:
    config = config_for(data, tmp_path)
    (survivor,) = jobs = [build(config, BoardComm())]
    meet(jobs)
    step(jobs)
    save(survivor)
    step(jobs)
    meet([build(config, BoardComm()), survivor], KnownRun(survivor.run.folder, 2))
    assert survivor.progress.step == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cfg": "yolov5s"}, r"another model or other classes: model\.0\.conv\.weight is \(16, 3, 6, 6\) there and \(32, 3, 6, 6\) here"),
        ({"optim.optimizer": "adam"}, "another --optimizer"),
        ({"recipe.freeze": "10"}, "other layers frozen"),
    ],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(data: Path, tmp_path: Path, values: dict[str, object], words: str) -> None:
    first = build(config_for(data, tmp_path), LocalComm())
    synchronise(first)
    first.run.create(first.config)
    save(first)
    with pytest.raises(InputError, match=rf"{words}.*--weights .*last\.pt"):
        synchronise(build(config_for(data, tmp_path, resume=str(first.run.folder), **values), LocalComm()))
