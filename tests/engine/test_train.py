"""Whole runs, started as users start them: the same at any size, resumable at any step, and everything in its place."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from horoyolo.compression.build import COMPRESSORS
from horoyolo.data.synthetic import write_synthetic

TIMEOUT_S = 300
LOSSES = ("box_loss", "obj_loss", "cls_loss", "loss")
SYNCHRONISED = ["--sync-bn", "--epochs", 12, "--set", "evaluate_every=12"]  # 36 steps
# Times differ from run to run; nothing else may.
STABLE = ("step", "epoch", "update", "images", "batch_crc", *LOSSES, "lr", "workers")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 images to train on: batches of 16, 16 and 3, so that one worker of four gets none of the last."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(folder, 43, seed=0)
    return folder / "data.yaml"


def command(dataset: Path, project: Path, name: str, num_workers: int, *words: object) -> list[str]:
    launch = ["launch", "-np", str(num_workers), "--"] if num_workers > 1 else []
    job = ["train", "--data", dataset, "--cfg", "yolov5n", "--img", 64, "--batch", 16, "--precision", "fp32", "--project", project, "--name", name]
    return [sys.executable, "-m", "horoyolo", *launch, *map(str, [*job, "--workers", 0, *words])]


def environment(num_threads: int = 1) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(num_threads)}


def run(argv: list[str], status: int = 0, num_threads: int = 1) -> str:
    done = subprocess.run(argv, env=environment(num_threads), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stderr


def steps(project: Path, name: str) -> list[dict[str, str]]:
    with (project / name / "steps.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def stable(rows: list[dict[str, str]]) -> list[list[str]]:
    return [[row[column] for column in STABLE] for row in rows]


@pytest.fixture(scope="module")
def sizes(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with 1, 2 and 4 workers, and with 2 once more: a folder each. YOLOv5's own rates, at which a fresh detector is chaotic."""
    project = tmp_path_factory.mktemp("sizes")
    for name, num_workers in {"1": 1, "2": 2, "4": 4, "2 again": 2}.items():
        run(command(dataset, project, name, num_workers, *SYNCHRONISED), num_threads=2 if name == "1" else 1)
    return project


@pytest.mark.parametrize("num_workers", ["2", "4"])
def test_the_same_run_at_any_size(sizes: Path, num_workers: str) -> None:
    alone, together = steps(sizes, "1"), steps(sizes, num_workers)
    assert len(alone) == len(together) == 36
    assert [row["images"] for row in alone] == ["16", "16", "3"] * 12
    assert {row["workers"] for row in together} == {num_workers}
    for column in ("step", "epoch", "update", "images", "batch_crc", "lr"):
        assert [row[column] for row in together] == [row[column] for row in alone], column
    for column in LOSSES:
        for mine, theirs in zip(alone, together, strict=True):
            assert float(theirs[column]) == pytest.approx(float(mine[column]), rel=1e-6), (column, mine["step"])


@pytest.mark.parametrize("num_workers", ["2", "4"])
def test_the_same_weights_at_any_size(sizes: Path, num_workers: str) -> None:
    alone, together = (torch.load(sizes / name / "weights" / "last.pt")["model"] for name in ("1", num_workers))
    assert alone.keys() == together.keys()
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


def test_the_same_bits_when_repeated(sizes: Path) -> None:
    assert stable(steps(sizes, "2")) == stable(steps(sizes, "2 again"))


def test_every_image_is_evaluated_once_at_any_size(sizes: Path) -> None:
    metrics = {name: json.loads((sizes / name / "metrics.json").read_text())["last"] for name in ("1", "2", "4")}
    assert metrics["1"]["images"] == 8
    for name in ("2", "4"):
        assert metrics[name]["images"] == 8
        assert metrics[name]["instances"] == metrics["1"]["instances"] > 0


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs with one worker and YOLOv5's own settings."""
    project = tmp_path_factory.mktemp("whole")
    run(command(dataset, project, "run", 1, "--epochs", 4))
    return project


def test_a_run_folder_holds_what_scripts_rely_on(whole: Path) -> None:
    folder = whole / "run"
    for name in ("config.yaml", "results.csv", "steps.csv", "metrics.json", "weights/last.pt", "weights/best.pt", "logs/rank-0.log"):
        assert (folder / name).is_file(), name
    assert {path.name for path in (folder / "plots").iterdir()} >= {"losses.png", "map.png", "train_batch0.png"}
    assert list(folder.rglob("events.out.tfevents*"))
    assert {path.name for path in (folder / "checkpoints").glob("*.pt")} >= {"step-00000009.pt", "step-00000012.pt"}  # and that of the best epoch
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["last"]["epoch"] == 3
    for name in ("map50", "map50_95", "precision", "recall", "per_class", "images", "instances", "epoch"):
        assert name in metrics["best"]
    assert set(metrics["last"]["per_class"]) == set(yaml.safe_load((folder / "config.yaml").read_text()) and {"circle", "square", "triangle"})
    with (folder / "results.csv").open(newline="") as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["0", "1", "2", "3"]
    assert not list(folder.rglob("*.tmp"))


def test_val_and_predict_take_the_weights(whole: Path, dataset: Path, tmp_path: Path) -> None:
    weights = whole / "run" / "weights" / "last.pt"
    horoyolo = [sys.executable, "-m", "horoyolo"]
    run([*horoyolo, "val", "--weights", str(weights), "--data", str(dataset), "--precision", "fp32", "--json", str(tmp_path / "val.json")])
    scored = json.loads((tmp_path / "val.json").read_text())
    trained = json.loads((whole / "run" / "metrics.json").read_text())["last"]
    assert scored["map50"] == pytest.approx(trained["map50"], abs=1e-6)
    source = dataset.parent / "images" / "val"
    run([*horoyolo, "predict", "--weights", str(weights), "--source", str(source), "--out", str(tmp_path / "out"), "--conf", "0.01"])
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(predictions) == len(list(source.iterdir()))


def test_flags_of_yolov5_say_what_is_learned_scored_and_kept(dataset: Path, tmp_path: Path) -> None:
    run(command(dataset, tmp_path, "run", 1, "--epochs", 4, "--single-cls", "--noval", "--noplots", "--save-period", 2))
    folder = tmp_path / "run"
    weights = {path.name for path in (folder / "weights").iterdir()}
    assert weights == {"last.pt", "best.pt", "epoch2.pt", "epoch4.pt"}
    with (folder / "results.csv").open(newline="") as stream:
        assert [bool(row["map50"]) for row in csv.DictReader(stream)] == [False, False, False, True]
    assert list((folder / "plots").iterdir()) == []
    trained = json.loads((folder / "metrics.json").read_text())
    assert set(trained) == {"last", "best"}
    assert set(trained["last"]["per_class"]) == {"item"}
    words = ["val", "--weights", str(folder / "weights" / "epoch4.pt"), "--data", str(dataset), "--precision", "fp32"]
    run([sys.executable, "-m", "horoyolo", *words, "--single-cls", "--json", str(tmp_path / "val.json")])
    scored = json.loads((tmp_path / "val.json").read_text())
    assert scored["instances"] == trained["last"]["instances"] > 0
    assert scored["map50"] == pytest.approx(trained["last"]["map50"], abs=1e-6)
    told = run([sys.executable, "-m", "horoyolo", *words], status=2)
    assert "knows 1 classes" in told
    assert "has 3: weights trained for these classes are wanted, or --single-cls" in told


def stop_after(argv: list[str], folder: Path, num_steps: int) -> None:
    """Starts a run and stops it with SIGTERM when it has taken ``num_steps`` steps; it ends with 75."""
    process = subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_steps(process, folder, num_steps)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 75
    process.communicate()


def wait_for_steps(process: subprocess.Popen, folder: Path, num_steps: int) -> None:
    """Returns when a run has taken so many."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (folder / "steps.csv").exists() or len(steps(folder.parent, folder.name)) < num_steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_run_whose_terminal_goes_away_stops_with_a_checkpoint(
    dataset: Path, tmp_path: Path, in_terminal: Callable[..., tuple[subprocess.Popen, Callable[[], None]]], num_workers: int
) -> None:
    """Loaders belong to the terminal as well, and a progress line would be written to it."""
    process, hang_up = in_terminal(command(dataset, tmp_path, "run", num_workers, "--epochs", 40, "--workers", 1), environment())
    wait_for_steps(process, tmp_path / "run", num_steps=4)
    hang_up()
    assert process.wait(TIMEOUT_S) == 75
    taken = int(steps(tmp_path, "run")[-1]["step"])
    assert (tmp_path / "run" / "checkpoints" / f"step-{taken:08d}.pt").is_file()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_run_goes_on_where_it_was(dataset: Path, whole: Path, tmp_path: Path, num_workers: int) -> None:
    """SIGTERM in the middle: exit 75 with a checkpoint; ``--resume auto`` goes on at the next image and ends as if nothing had been."""
    argv = command(dataset, tmp_path, "run", num_workers, "--epochs", 4, "--resume", "auto")
    stop_after(argv, tmp_path / "run", num_steps=4)
    assert 4 <= len(steps(tmp_path, "run")) < 12

    run(argv)
    resumed = steps(tmp_path, "run")
    assert [int(row["step"]) for row in resumed] == list(range(1, 13))
    expected = steps(whole, "run")
    assert [row["batch_crc"] for row in resumed] == [row["batch_crc"] for row in expected]
    if num_workers == 1:
        assert stable(resumed) == stable(expected)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "finished already" in run(argv)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_stopped_run_goes_on_alike_with_other_workers(sizes: Path, dataset: Path, tmp_path: Path, num_workers: int) -> None:
    stop_after(command(dataset, tmp_path, "run", 2, *SYNCHRONISED), tmp_path / "run", num_steps=2)
    stopped_at = len(steps(tmp_path, "run"))
    assert stopped_at <= 6, "so that thirty steps are left"
    run(command(dataset, tmp_path, "run", num_workers, *SYNCHRONISED, "--resume", "auto"))
    resumed, whole = steps(tmp_path, "run"), steps(sizes, "2")
    assert [row["workers"] for row in resumed] == ["2"] * stopped_at + [str(num_workers)] * (36 - stopped_at)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert (mine["batch_crc"], mine["lr"]) == (theirs["batch_crc"], theirs["lr"])
        assert [float(mine[column]) for column in LOSSES] == pytest.approx([float(theirs[column]) for column in LOSSES], rel=1e-6), mine["step"]


@pytest.mark.parametrize(("stop_at", "compression"), enumerate(COMPRESSORS, start=1))
def test_a_stopped_compressed_run_goes_on_with_the_same_bits(dataset: Path, tmp_path: Path, stop_at: int, compression: str) -> None:
    """Random numbers, factors and what each worker has not sent yet come back: resumed on as many workers, nothing tells that it was stopped."""
    sets = [word for setting in ("comms.warmup_updates=1", "evaluate_every=4", "optim.nominal_batch=0") for word in ("--set", setting)]
    words = ["--epochs", 4, "--compression", compression, *sets]
    run(command(dataset, tmp_path, "whole", 2, *words))
    argv = command(dataset, tmp_path, "stopped", 2, *words, "--resume", "auto")
    stop_after(argv, tmp_path / "stopped", num_steps=stop_at)
    assert stop_at <= len(steps(tmp_path, "stopped")) < 12
    checkpoints = {path.name for path in (tmp_path / "stopped" / "checkpoints").glob("*.rank-*.pt")}
    assert {name.partition(".")[2] for name in checkpoints} == {"rank-0-of-2.pt", "rank-1-of-2.pt"}
    run(argv)
    assert len(steps(tmp_path, "whole")) == 12
    assert stable(steps(tmp_path, "stopped")) == stable(steps(tmp_path, "whole"))
    final = [torch.load(tmp_path / name / "weights" / "last.pt", weights_only=True) for name in ("whole", "stopped")]
    assert all(torch.equal(left, right) for left, right in zip(tensors(final[0]), tensors(final[1]), strict=True))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_run_that_could_not_write_what_it_ended_with_fails(dataset: Path, tmp_path: Path, num_workers: int) -> None:
    """No file may be larger than 300 KB, as on a disk that is nearly full."""
    argv = command(dataset, tmp_path, "run", num_workers, "--epochs", 1)
    told = run(["bash", "-c", 'ulimit -f 300; exec "$@"', "-", *argv], status=1)
    assert told.count("done after step 3, but not written: weights of epoch 1 and checkpoint of step 3; ") == 1
    assert "no good checkpoint: there is none in" in told
    assert len(steps(tmp_path, "run")) == 3


def tensors(tree: object) -> list[torch.Tensor]:
    """All tensors of nested dictionaries, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for value in tree.values() for tensor in tensors(value)] if isinstance(tree, dict) else []


def test_resume_of_a_folder_takes_its_configuration_and_more_epochs(whole: Path, tmp_path: Path) -> None:
    """As YOLOv5's ``--resume``: the run's own settings, with what is given on top."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole / "run"), str(folder)], check=True)
    run([sys.executable, "-m", "horoyolo", "train", "--resume", str(folder / "weights" / "last.pt"), "--epochs", "5"])
    rows = steps(tmp_path, "run")
    assert [row["epoch"] for row in rows[12:]] == ["4", "4", "4"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 5
