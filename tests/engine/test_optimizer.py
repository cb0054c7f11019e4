from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from horoyolo.config import Optim
from horoyolo.engine.optimizer import build_optimizer
from horoyolo.engine.schedule import Rates
from horoyolo.engine.train import set_rates
from horoyolo.model.yolo import YOLO, build_model

OPTIMIZERS = [Optim(optimizer=name) for name in ("sgd", "adam", "adamw")]


def learn(model: YOLO, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: optim.optimizer)
def test_steps_are_those_of_torch(optim: Optim) -> None:
    model = build_model("yolov5n", 2)
    twin = copy.deepcopy(model)
    ours = build_optimizer(model, optim, 0.01, 0.9, 0.001)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [twin.get_parameter(names[parameter]) for parameter in group["params"]]} for group in ours.param_groups]
    plain = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.optimizer](groups)
    learn(model, ours, 3)
    learn(twin, plain, 3)
    for name, parameter in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert ours.state_dict()["state"].keys() == plain.state_dict()["state"].keys()


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: optim.optimizer)
def test_state_goes_on_where_it_was(optim: Optim) -> None:
    model = build_model("yolov5n", 2)
    first = build_optimizer(model, optim, 0.01, 0.9, 0.001)
    learn(model, first, 2)
    twin = copy.deepcopy(model)
    second = build_optimizer(twin, optim, 0.5, 0.5, 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    learn(model, first, 2)
    learn(twin, second, 2)
    for name, parameter in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_worker_imports_no_compiler_and_no_plotting() -> None:
    # Each takes long beside what else a worker does before its first step, and memory.
    code = """
import sys
import horoyolo.engine.start
from horoyolo.config import Optim
from horoyolo.engine.optimizer import build_optimizer
from horoyolo.model.yolo import build_model
model = build_model("yolov5n", 2)
optimizer = build_optimizer(model, Optim(), 0.01, 0.9, 0.001)
sum(head.sum() for head in model(__import__("torch").zeros(2, 3, 64, 64))).backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print(*(name for name in ("torch._dynamo", "sympy", "matplotlib", "tensorboard", "pandas") if name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == []


def test_weight_decay_is_that_of_this_run_not_of_the_one_it_goes_on_from() -> None:
    optim = Optim()
    model = build_model("yolov5n", 2)
    before = build_optimizer(model, optim, 0.01, 0.9, 0.001).state_dict()
    optimizer = build_optimizer(model, optim, 0.01, 0.9, 0.002)
    optimizer.load_state_dict(before)
    set_rates(optimizer, Rates(0.01, 0.01, 0.9, weight_decay=0.002, accumulate=1), backbone_lr=1.0)
    assert {(group["kind"], group["weight_decay"]) for group in optimizer.param_groups} == {("weight", 0.002), ("norm", 0.0), ("bias", 0.0)}
