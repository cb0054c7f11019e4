"""The law of size, over every option of the recipe: 1, 2 and 4 workers have the same losses and end with the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horoyolo.data.synthetic import write_synthetic

WORKER = Path(__file__).with_name("recipe_worker.py")
_spec = importlib.util.spec_from_file_location("recipe_worker", WORKER)
assert _spec
assert _spec.loader
recipe_worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe_worker)
OPTIONS = recipe_worker.OPTIONS

Outcomes = dict[str, dict[str, Any]]  # by option


@pytest.fixture(scope="module")
def sizes(run_workers: Callable[..., list[Outcomes]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcomes]]:
    """What each worker of 1, 2 and 4 ended with."""
    scenes = tmp_path_factory.getbasetemp() / "scenes"
    write_synthetic(scenes, 9, seed=0)
    (scenes / "table.yaml").write_text(recipe_worker.TABLE)
    return {size: run_workers(WORKER, size, timeout_s=600) for size in (1, 2, 4)}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_same_run_at_any_size(sizes: dict[int, list[Outcomes]], option: str) -> None:
    alone = sizes[1][0][option]
    assert len(alone["losses"]) >= 3
    for outcomes in (sizes[2], sizes[4]):
        for outcome in (worker[option] for worker in outcomes):
            torch.testing.assert_close(torch.tensor(outcome["losses"]), torch.tensor(alone["losses"]), rtol=1e-6, atol=0)
            assert all(torch.equal(tensor, outcome["weights"][name]) for name, tensor in alone["weights"].items())
            assert (outcome["epochs"], outcome["exchanged"]) == (alone["epochs"], alone["exchanged"])


def test_every_option_does_something(sizes: dict[int, list[Outcomes]]) -> None:
    outcomes = sizes[1][0]
    for option in list(OPTIONS)[1:]:
        assert outcomes[option]["losses"] != outcomes["as usual"]["losses"], option


def test_frozen_layers_are_not_exchanged_and_stay(sizes: dict[int, list[Outcomes]]) -> None:
    """Neither weights nor statistics change; and the initial ones are those of the same seed."""
    usual, frozen = sizes[2][1]["as usual"], sizes[2][1]["frozen backbone, ReLU"]
    assert frozen["exchanged"] < usual["exchanged"]
    for name, tensor in frozen["weights"].items():
        if name.endswith("running_mean"):
            assert (tensor == 0).all() == (int(name.split(".")[1]) < 3), name


def test_all_workers_lose_patience_together(sizes: dict[int, list[Outcomes]]) -> None:
    assert {tuple(worker["patience"]["epochs"]) for outcomes in sizes.values() for worker in outcomes} == {(0, 1, 2)}
