"""The law of size, over every option of data and recipe: 1, 2 and 4 workers have the same losses and end with the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horoyolo.config import Config, Hyper, Optim, Recipe
from horoyolo.data.scan import Split, scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.data.synthetic import write_synthetic
from horoyolo.engine.build import build_loss
from horoyolo.engine.recipe import box_sizes, class_counts, imbalance_notes, recipe_lines, settle_anchors
from horoyolo.engine.schedule import Schedule
from horoyolo.model.anchors import best_possible_recall
from horoyolo.model.yolo import build_model, load_layer_table, model_from_table

WORKER = Path(__file__).with_name("recipe_worker.py")
_spec = importlib.util.spec_from_file_location("recipe_worker", WORKER)
assert _spec
assert _spec.loader
recipe_worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe_worker)
OPTIONS, CACHES = recipe_worker.OPTIONS, recipe_worker.CACHES
ROUNDED = ("multi-scale, close mosaic",)  # whose sums of other parts round another way in the last bit; all others have the same bits

Outcomes = dict[str, dict[str, Any]]  # by option


@pytest.fixture(scope="module")
def sizes(run_workers: Callable[..., list[Outcomes]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcomes]]:
    """What each worker of 1, 2 and 4 ended with."""
    scenes = tmp_path_factory.getbasetemp() / "scenes"
    write_synthetic(scenes, 9, seed=0)
    for file in (scenes / "labels" / "train").iterdir():  # outlines instead of boxes, which copy-paste needs
        rows = [[float(word) for word in line.split()] for line in file.read_text().splitlines()]
        corners = [(x - w / 2, y, x, y - h / 2, x + w / 2, y, x, y + h / 2) for _, x, y, w, h in rows]
        file.write_text("".join(f"{row[0]:g} {' '.join(map(str, corner))}\n" for row, corner in zip(rows, corners, strict=True)))
    (scenes / "table.yaml").write_text(recipe_worker.TABLE)
    (scenes / "pipeline.yaml").write_text(recipe_worker.PIPELINE)
    return {size: run_workers(WORKER, size, timeout_s=600) for size in (1, 2, 4)}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_same_run_at_any_size(sizes: dict[int, list[Outcomes]], option: str) -> None:
    alone = sizes[1][0][option]
    assert len(alone["losses"]) >= 3
    for outcomes in (sizes[2], sizes[4]):
        for outcome in (worker[option] for worker in outcomes):
            torch.testing.assert_close(torch.tensor(outcome["losses"]), torch.tensor(alone["losses"]), rtol=1e-6, atol=0)
            bound = 1e-6 if option in ROUNDED else 0.0
            torch.testing.assert_close(outcome["weights"], alone["weights"], rtol=bound, atol=bound)
            assert (outcome["epochs"], outcome["exchanged"]) == (alone["epochs"], alone["exchanged"])


def test_every_option_does_something(sizes: dict[int, list[Outcomes]]) -> None:
    outcomes = sizes[1][0]
    usual = outcomes["as usual"]["losses"]
    for option in list(OPTIONS)[1:]:
        assert (outcomes[option]["losses"][: len(usual)] == usual) == (option in CACHES), option


def test_frozen_layers_are_not_exchanged_and_stay(sizes: dict[int, list[Outcomes]]) -> None:
    """Neither weights nor statistics change; and the initial ones are those of the same seed."""
    usual, frozen = sizes[2][1]["as usual"], sizes[2][1]["frozen backbone, ReLU"]
    assert frozen["exchanged"] < usual["exchanged"]
    for name, tensor in frozen["weights"].items():
        if name.endswith("running_mean"):
            assert (tensor == 0).all() == (int(name.split(".")[1]) < 3), name


def test_all_workers_lose_patience_together(sizes: dict[int, list[Outcomes]]) -> None:
    assert {tuple(worker["patience"]["epochs"]) for outcomes in sizes.values() for worker in outcomes} == {(0, 1, 2)}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("labelled") / "data"
    write_synthetic(folder, 20, seed=0)
    return scan_split(load_data_spec(folder / "data.yaml"), "train")


def test_box_sizes_are_those_of_the_letterboxed_images(split: Split) -> None:
    sizes = box_sizes(split, 320)
    height, width = split.shapes_hw[0]
    first = split.labels[0][0, 3:5] * [width, height] * 320 / max(height, width)
    assert sizes[0] == pytest.approx(first)
    assert len(sizes) == split.report.boxes == class_counts(split, 3).sum()


def test_anchors_that_fit_stay(split: Split) -> None:
    model = build_model("yolov5n", 3)
    before = model.anchors.clone()
    settle_anchors(model, split, Config(img=320))
    assert torch.equal(model.anchors, before)


@pytest.mark.parametrize(("autoanchor", "reached"), [(True, True), (False, False)])
def test_anchors_out_of_reach_are_fitted_anew(split: Split, autoanchor: bool, reached: bool) -> None:
    model = build_model("yolov5n", 3)
    model.set_anchors(torch.full((9, 2), 3000.0))
    settle_anchors(model, split, Config(img=320, recipe=Recipe(autoanchor=autoanchor)))
    recall = best_possible_recall(box_sizes(split, 320), model.anchors_px.flatten(0, 1).numpy(), 4.0)
    assert (recall > 0.98) == reached


def test_anchors_of_which_a_table_says_only_how_many_are_fitted(split: Split) -> None:
    model = model_from_table({**load_layer_table("yolov5n"), "anchors": 2}, 3)
    settle_anchors(model, split, Config(img=320))
    assert model.anchors.shape == (3, 2, 2)
    assert len(model.anchors.flatten(0, 1).unique(dim=0)) == 6
    assert best_possible_recall(box_sizes(split, 320), model.anchors_px.flatten(0, 1).numpy(), 4.0) > 0.98


def test_what_is_done_about_rare_classes_is_said(split: Split) -> None:
    config = Config(img=320, recipe=Recipe(class_weights=0.5), hyp=Hyper(fl_gamma=1.5))
    model = build_model("yolov5n", 3, split.names)
    counts = class_counts(split, 3)
    loss = build_loss(config, model, counts)
    notes = imbalance_notes(config, loss, model.names)["imbalance"]
    assert notes["fl_gamma"] == 1.5
    assert sorted(notes["class_weights"], key=notes["class_weights"].get) == [split.names[int(i)] for i in counts.argsort(descending=True)]
    (line,) = recipe_lines(config, model, loss, Schedule(config.hyp, config.optim, 300, 16, 50), counts)
    assert line.startswith("class weights, frequency to the power of -0.5: circle")
    assert imbalance_notes(Config(), build_loss(Config(), model, counts), model.names) == {}


@pytest.mark.parametrize(
    ("weights", "nominal_batch", "epochs", "said"), [("", 64, 100, True), ("", 64, 1000, False), ("", 16, 100, False), ("yolov5n.pt", 64, 100, False)]
)
def test_few_updates_from_scratch_are_told(split: Split, weights: str, nominal_batch: int, epochs: int, said: bool) -> None:
    config = Config(weights=weights, optim=Optim(nominal_batch=nominal_batch))
    model, counts = build_model("yolov5n", 3, split.names), class_counts(split, 3)
    lines = recipe_lines(config, model, build_loss(config, model, counts), Schedule(config.hyp, config.optim, epochs, 16, 13), counts)
    assert [line.split(" are")[0] for line in lines] == (["400 updates"] if said else [])
