"""What the flags of ``train`` mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from horoyolo import config as configuration
from horoyolo.cli import build_parser
from horoyolo.config import Config
from horoyolo.flags import train_config


def test_flags_of_the_recipe_mean_their_keys() -> None:
    words = ["--data", "d.yaml", "--cfg", "yolov5n", "--freeze", "0", "1", "2", "--patience", "7", "--noautoanchor", "--hyp", "hyp.scratch-med.yaml"]
    config = train_config(build_parser().parse_args(["train", *words]))
    assert (config.recipe.freeze, config.recipe.patience, config.recipe.autoanchor, config.hyp.scale) == ("0,1,2", 7, False, 0.9)


def test_flags_of_yolov5_mean_their_keys() -> None:
    words = ["--data", "d.yaml", "--cfg", "yolov5n", "--single-cls", "--noval", "--noplots", "--save-period", "10"]
    config = train_config(build_parser().parse_args(["train", *words]))
    assert (config.input.single_cls, config.evaluate_every, config.plots, config.save_period) == (True, 0, False, 10)
    assert train_config(build_parser().parse_args(["train", *words[:4], "--save-period", "-1"])) == Config(data="d.yaml", cfg="yolov5n")


def test_a_found_batch_is_that_of_the_run_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/train/exp"
    folder.mkdir(parents=True)
    words = ["train", "--data", "d.yaml", "--cfg", "yolov5n", "--auto-batch", "--resume"]
    assert train_config(build_parser().parse_args([*words, "auto", "--name", "other"])).batch == -1
    (folder / "config.yaml").write_text(configuration.dump(Config(data="d.yaml", cfg="yolov5n", batch=48)))
    assert train_config(build_parser().parse_args([*words, "auto"])).batch == 48
    assert train_config(build_parser().parse_args(["train", "--data", "d.yaml", "--cfg", "yolov5n", "--batch", "-1"])).batch == -1


@pytest.mark.parametrize(("word", "optimizer"), [("SGD", "sgd"), ("Adam", "adam"), ("AdamW", "adamw"), ("adamw", "adamw")])
def test_optimizers_are_named_as_in_yolov5(word: str, optimizer: str) -> None:
    words = ["train", "--data", "d.yaml", "--cfg", "yolov5n", "--optimizer", word]
    assert train_config(build_parser().parse_args(words)).optim.optimizer == optimizer


def test_a_run_named_by_set_is_the_one_that_is_resumed(tmp_path: Path) -> None:
    for name, seed in (("exp", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(configuration.dump(Config(data="d.yaml", cfg="yolov5n", seed=seed)))
    words = ["train", "--resume", "auto", "--project", str(tmp_path), "--set", "name=b"]
    assert train_config(build_parser().parse_args(words)).seed == 2
