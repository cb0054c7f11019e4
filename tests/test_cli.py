"""Bad input: one line that says what, where and what would be right, exit 2, and nothing written."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from horoyolo import cli
from horoyolo.config import AgreedError
from horoyolo.data.synthetic import write_synthetic
from horoyolo.elastic.coordinator import Elastic
from horoyolo.engine.checkpoint import serialised, write_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(folder, 12, seed=0)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which nothing may appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command refused with."""
    assert cli.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def train(dataset: Path, *words: object) -> list[object]:
    return ["train", "--data", dataset / "data.yaml", "--cfg", "yolov5n", "--epochs", 1, *words]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bathc", 4], "did you mean --batch"),
        (["--set", "hyp.lr=1"], "did you mean 'hyp.lr"),
        (["--set", "hyp.lr0"], "KEY=VALUE"),
        (["--epochs", "ten"], "a whole number"),
        (["--cfg", "yolov5q"], "yolov5"),
        (["--weights", "absent.pt"], "absent.pt"),
        (["--hyp", "absent.yaml"], "absent.yaml"),
        (["--compression", "zip"], "none"),
        (["--compression", "top"], "did you mean 'topk'"),
        (["--set", "comms.topk_ratio=0"], "above 0"),
        (["--set", "comms.powersgd_rank=0"], "at least 1"),
        (["--precision", "fp8"], "fp32"),
        (["--device", "7"], "GPU"),
        (["--device", "tpu"], "cpu, cuda"),
        (["--elastic"], "horoyolo launch --min-np"),
        (["--quad"], "not supported yet"),
        (["--resume", "absent"], "no run folder"),
        (["--resume"], "no run in"),
        (["--img", 100], "multiple of 32"),
        (["--cfg", "yolov5n6", "--img", 96], "a multiple of 64, the largest stride of yolov5n6, is wanted: 128"),
        (["--freeze", 25], "all 25 layers"),
        (["--freeze", 3, 25], "layer 25 is beyond"),
        (["--freeze", "backbone"], "a number of layers"),
        (["--hyp", "lower"], "presets: low"),
    ],
)
def test_train_refuses(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str], words: list[object], expected: str) -> None:
    assert expected in refused(capsys, *train(dataset, *words))
    assert list(here.iterdir()) == []


def broken(dataset: Path, here: Path, damage: Callable[[Path], object]) -> Path:
    """A copy of the data set with something wrong."""
    copy = here.parent / "broken"
    for file in dataset.rglob("*"):
        if file.is_file() and ".horoyolo-cache" not in file.parts:
            target = copy / file.relative_to(dataset)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    damage(copy)
    return copy


def first_label(copy: Path) -> Path:
    return next(path for path in sorted((copy / "labels" / "train").iterdir()) if path.read_text().strip())


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda copy: (copy / "data.yaml").unlink(), "data.yaml"),
        (lambda copy: (copy / "data.yaml").write_text("names: [a\ntrain: x"), "line"),
        (lambda copy: first_label(copy).write_text("7 0.5 0.5 0.1 0.1\n"), "class"),
        (lambda copy: remove_all(copy / "images" / "train"), "no images"),
        (lambda copy: remove_all(copy / "labels" / "train"), "no labels"),
    ],
    ids=["missing data file", "unreadable yaml", "class beyond nc", "no images", "no labels"],
)
def test_train_refuses_data(
    dataset: Path, here: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], expected: str
) -> None:
    copy = broken(dataset, here, damage)
    assert expected in refused(capsys, *train(copy))
    assert list(here.iterdir()) == []


def test_a_torn_checkpoint_is_refused(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "run"
    path = write_checkpoint(run / "checkpoints", serialised({"value": torch.zeros(100)}), 1, keep=1, notes={})
    (run / "config.yaml").write_text("data: x\n")
    path.write_bytes(path.read_bytes()[:-20])
    assert "torn" in refused(capsys, *train(dataset, "--resume", path))
    assert "torn" in refused(capsys, *train(dataset, "--resume", run))


def test_torn_weights_are_refused(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = here / "torn.pt"
    torch.save({"model": torch.zeros(1000)}, torn)
    torn.write_bytes(torn.read_bytes()[:500])
    assert "torn.pt" in refused(capsys, *train(dataset, "--weights", torn))
    assert list(here.iterdir()) == [torn]


def test_launch_checks_the_job_first(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "3 workers" in refused(capsys, "launch", "-np", 3, "--", *train(dataset, "--batch", 2))
    assert "did you mean --epochs" in refused(capsys, "launch", "-np", 2, "--", *train(dataset, "--epoch", 2))
    assert "at least 1" in refused(capsys, "launch", "--min-np", 0, "--", *train(dataset))
    assert "comms.compression = 'zip'" in refused(capsys, "launch", "-np", 2, "--", *train(dataset, "--compression", "zip"))
    assert "'hosts' can't be read" in refused(capsys, "launch", "--hostfile", "hosts", "--", *train(dataset))
    assert "-- train" in refused(capsys, "launch", "-np", 2)
    assert "horovodrun" in refused(capsys, "launch", "-np", 2, "--launcher", "ssh", "--dry-run", "--", *train(dataset, "--batch", 2))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [["-np", 2], ["--stage", "/scratch"], ["--transport", "mpi"], ["--nic", "ib0"], ["--ssh-port", 2222], ["--ssh-identity", "key"]],
    ids=lambda words: words[0],
)
def test_a_batch_script_leaves_out_nothing_that_was_asked_for(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str], words: list) -> None:
    assert f"{words[0]} has no place" in refused(capsys, "launch", "--slurm", "--script", "a.sbatch", *words, "--", *train(dataset))
    assert list(here.iterdir()) == []


def test_a_batch_script_has_an_image_for_each_worker_it_asks_for(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "--slurm", "--nodes", 4, "--gpus-per-node", 8, "--script", "a.sbatch", "--", *train(dataset, "--batch", 16)]
    assert "batch = 16 over 32 workers" in refused(capsys, *words)
    assert list(here.iterdir()) == []


def test_an_elastic_job_names_its_batch(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for script in (["--dry-run"], ["--slurm", "--script", "a.sbatch"]):
        assert "--batch -1 in an elastic job" in refused(capsys, "launch", "--min-np", 2, *script, "--", *train(dataset, "--auto-batch"))
    assert list(here.iterdir()) == []


def test_an_elastic_job_has_no_more_workers_than_a_batch_has_images(dataset: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on this machine alone as many as were asked for."""
    asked: list[tuple[int | None, int]] = []

    def run(job: object, elastic: Elastic) -> int:
        asked.append((elastic.limits.max_np, sum(host.slots for host in elastic.ask())))
        return 0

    monkeypatch.setattr("horoyolo.elastic.launch.run_elastic", run)
    for most in ([], ["--max-np", "3"], ["--hosts", "a:9,b:9"]):
        assert cli.main(["launch", "--min-np", "2", *most, "--", *map(str, train(dataset, "--batch", 4))]) == 0
    assert asked == [(4, 2), (3, 3), (4, 18)]


def test_what_one_worker_alone_meets_is_told_with_its_name(
    dataset: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_RANK", "3")
    assert refused(capsys, "train", "--data", "absent.yaml", "--cfg", "yolov5n").startswith(f"horoyolo: error: worker 3 on {platform.node()}: ")


@pytest.mark.parametrize(("rank", "told"), [("0", 1), ("3", 0)])
def test_what_all_workers_meet_is_told_once(
    rank: str, told: int, dataset: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_RANK", rank)
    monkeypatch.setattr(cli, "TELL_S", 0.0)
    monkeypatch.setattr("horoyolo.engine.start.start_training", lambda *_, **__: (_ for _ in ()).throw(AgreedError("the settings differ")))
    assert cli.main([*map(str, train(dataset))]) == 2
    assert capsys.readouterr().err.count("horoyolo: error: the settings differ\n") == told


def test_a_dry_run_prints_what_would_run(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "-np", "2", "--dry-run", "--", *map(str, train(dataset, "--batch", 2))]) == 0
    line = capsys.readouterr().out
    assert "horovodrun -np 2 -H localhost:2 --gloo" in line
    assert "-m horoyolo train --data" in line
    assert list(here.iterdir()) == []


def test_unknown_command_and_missing_flags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'trian'" in refused(capsys, "trian")
    assert "--data" in refused(capsys, "train", "--cfg", "yolov5n")
    assert "--weights" in refused(capsys, "predict", "--source", "x", "--out", "y")


def test_several_workers_without_horovod(dataset: Path, here: Path) -> None:
    """The environment of a launcher, on a Python that has no Horovod."""
    code = "import sys; sys.modules['horovod'] = None; from horoyolo.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, train(dataset))],
        env={"PATH": "/usr/bin:/bin", "HOROVOD_SIZE": "2", "HOROVOD_RANK": "0", "HOME": str(here.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "scripts/setup.sh" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("words", [["launch", "--help"], ["launch", "-np", "2", "--dry-run", "--", "train"]])
def test_launch_works_without_torch(dataset: Path, here: Path, words: list[str]) -> None:
    code = "import sys; sys.modules['torch'] = None; from horoyolo.cli import main; sys.exit(main())"
    job = list(map(str, train(dataset)[1:])) if words[-1] == "train" else []
    done = subprocess.run([sys.executable, "-c", code, *words, *job], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_corrupt_image_is_left_out_and_named(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(path.name for path in (dataset / "images" / "train").iterdir())
    copy = broken(dataset, here, lambda folder: (folder / "images" / "train" / names[0]).write_bytes(b"not a picture"))
    assert cli.main(["data", "check", "--data", str(copy / "data.yaml")]) == 0
    report = capsys.readouterr().out
    assert names[0] in report
    assert "corrupt" in report


def test_data_synth_makes_what_it_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "at least 0" in refused(capsys, "data", "synth", "--out", "data", "--images", 5, "--seed", -1)
    assert cli.main(["data", "synth", "--out", "data", "--images", "5", "--seed", "3"]) == 0
    assert len(list((here / "data" / "images").rglob("*.jpg"))) == 5
    again = here / "again"
    write_synthetic(again, 5, seed=3)
    for file in sorted((here / "data" / "images").rglob("*.jpg")):
        twin = again / file.relative_to(here / "data")
        assert np.array_equal(np.frombuffer(file.read_bytes(), np.uint8), np.frombuffer(twin.read_bytes(), np.uint8))
