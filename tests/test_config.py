"""The configuration: typed overrides, YOLOv5's hyper-parameter files, one clear line for what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo import config as configuration
from horoyolo.config import Config, Hyper, InputError, override, validate

USABLE = dataclasses.replace(Config(), data="d.yaml", cfg="yolov5n")


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(1, 10**6), st.booleans(), st.text(max_size=20))
def test_saved_and_loaded_it_is_the_same(lr0: float, batch: int, sync_bn: bool, name: str) -> None:
    config = override(Config(), {"hyp.lr0": lr0, "batch": batch, "comms.sync_bn": sync_bn, "name": name}, "test")
    assert override(Config(), yaml.safe_load(configuration.dump(config)), "test") == config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("hyp.lr0", "1e-3", 1e-3), ("batch", "8", 8), ("batch", "1e2", 100), ("comms.sync_bn", "False", False), ("name", "7", "7")],
)
def test_text_becomes_the_type_of_the_field(key: str, text: str, value: object) -> None:
    config = override(Config(), {key: text}, "--set")
    *sections, name = key.split(".")
    holder = getattr(config, sections[0]) if sections else config
    assert getattr(holder, name) == value
    assert type(getattr(holder, name)) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hyp.lr", 1, "did you mean 'hyp.lr"),
        ("bach", 1, "did you mean 'batch'"),
        ("batch", "2.5", "a whole number is wanted"),
        ("hyp.lr0", "fast", "a number is wanted"),
        ("comms.sync_bn", "perhaps", "true or false is wanted"),
        ("hyp", 3, "is a section"),
        ("batch.size", 3, "holds a single value"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: object, words: str) -> None:
    with pytest.raises(InputError) as error:
        override(Config(), {key: value}, "--set")
    assert words in str(error.value)
    assert str(error.value).startswith("--set: ")
    assert "\n" not in str(error.value)


def test_hyper_file_of_yolov5_runs_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "hyp.yaml"
    file.write_text("lr0: 0.02\nmomentum: 0.9\niou_t: 0.2\nmosaic: 1\nlrf: 1e-2\n")  # PyYAML reads 1e-2 as a text
    assert configuration.load_hyper(Config(), file).hyp == Hyper(lr0=0.02, momentum=0.9, lrf=0.01)


def test_unknown_hyper_is_named_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "hyp.yaml"
    file.write_text("momentun: 0.9\nlr0: 0.01\nalbumentation: 3\n")
    with pytest.raises(InputError, match=r"hyp\.yaml: unknown keys 'momentun' \(did you mean 'momentum'\?\), 'albumentation' \("):
        configuration.load_hyper(Config(), file)


@pytest.mark.parametrize("name", configuration.PRESETS)
def test_presets_are_whole_hyper_parameter_files(name: str) -> None:
    """Every key that a preset leaves out would silently be that of another preset. Label smoothing is a flag, of YOLOv5 too."""
    given = configuration.read_yaml(configuration.hyper_file(name), "a preset")
    assert given.keys() | {"anchors", "label_smoothing"} == {field.name for field in dataclasses.fields(Hyper)}
    hyper = configuration.load_hyper(Config(), name).hyp
    assert {key: getattr(hyper, key) for key in given} == given


def test_the_low_preset_is_the_default_and_yolov5_names_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration.load_hyper(Config(hyp=Hyper(lr0=5)), "low").hyp == Hyper()
    assert configuration.hyper_file("hyp.scratch-low.yaml") == configuration.hyper_file("low")
    assert configuration.hyper_file("data/hyps/hyp.VOC.yaml") == configuration.hyper_file("voc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "low").write_text("lr0: 0.5")
    assert configuration.load_hyper(Config(), "low").hyp == Hyper(lr0=0.5)  # a file goes before a name
    with pytest.raises(InputError, match=r"--hyp lower: no such file, and no preset; presets: low, med"):
        configuration.load_hyper(Config(), "lower")


@pytest.mark.parametrize(
    ("text", "layers"), [("", ()), ("0", ()), ("3", (0, 1, 2)), ("0,1,5", (0, 1, 5)), ("5 2", (2, 5)), ("1,1", (1,))]
)
def test_layers_to_freeze_as_yolov5_names_them(text: str, layers: tuple[int, ...]) -> None:
    assert configuration.frozen_layers(text) == layers


@pytest.mark.parametrize(("content", "words"), [("a: [1", "not valid yaml"), ("- 1", "no keys"), (None, "no such file")])
def test_unreadable_yaml(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=words):
        configuration.read_yaml(file, "file")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("img", 333, "a multiple of 32"),
        ("batch", 0, "at least 1"),
        ("hyp.mosaic", 1.5, "from 0 to 1"),
        ("hyp.lr0", float("nan"), "a finite number"),
        ("hyp.lr0", -1, "at least 0"),
        ("hyp.copy_paste", 1.5, "from 0 to 1"),
        ("hyp.momentum", 0, "above 0 and below 1"),
        ("hyp.momentum", 1, "above 0 and below 1"),
        ("hyp.weight_decay", -1, "at least 0"),
        ("hyp.box", float("inf"), "a finite number"),
        ("precision", "fp8", "fp32"),
        ("recipe.activation", "selu", "did you mean 'silu'"),
        ("recipe.box_loss", "iou", "did you mean 'giou'"),
        ("recipe.freeze", "backbone", "a number of layers"),
        ("recipe.freeze", "3,-1", "a number of layers"),
        ("recipe.patience", -1, "at least 0"),
        ("data", "", "no data set"),
        ("cfg", "", "no model"),
    ],
)
def test_values_that_no_run_could_use(key: str, value: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        validate(override(USABLE, {key: value}, "test"))


def test_new_anchors_need_autoanchor() -> None:
    with pytest.raises(InputError, match="leave one of the two out"):
        validate(override(USABLE, {"hyp.anchors": 3, "recipe.autoanchor": False}, "test"))


def test_defaults_are_usable() -> None:
    validate(USABLE)
