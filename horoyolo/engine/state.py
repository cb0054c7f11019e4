"""Everything a run needs to go on: what a checkpoint holds and what a resumed run takes back, and where a worker stands for the others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

IN_UPDATES = ("model", "ema", "optimizer", "compressor", "ledger")  # the parts that change in updates alone


class TrainingError(RuntimeError):
    """Training can't go on; one line that says why (exit status 1)."""


class Stateful(Protocol):
    """A part of a run that can be saved and restored."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Progress:
    """How far a run is. None of it depends on the number of workers."""

    step: int = 0  # global batches trained on
    update: int = 0  # optimizer updates
    last_update_step: int = 0  # value of step after the newest update
    skipped_updates: int = 0  # updates in a row that were left out because their gradient was not finite
    returns: int = 0  # to an earlier state, after many of those
    best_fitness: float = -1.0
    best_epoch: int = 0  # the newest that scored no worse than any before it
    scored_epoch: int = 0  # the newest that was evaluated
    epoch_losses: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # box, obj, cls, summed over the epoch's images so far
    epoch_images: int = 0

    def count(self, images: int, losses: Sequence[float]) -> None:
        """Adds one global batch of ``images`` with its losses per image (box, obj, cls)."""
        self.step += 1
        self.epoch_images += images
        self.epoch_losses = [total + loss * images for total, loss in zip(self.epoch_losses, losses, strict=True)]

    def score(self, epoch: int, fitness: float) -> bool:
        """Notes an evaluated epoch; whether it is the best so far. An equal one counts as no worse: a fresh model scores 0 for a while."""
        is_best = fitness > self.best_fitness
        if fitness >= self.best_fitness:
            self.best_fitness, self.best_epoch = fitness, epoch
        self.scored_epoch = epoch
        return is_best

    def out_of_patience(self, patience: int) -> bool:
        """Whether ``patience`` epochs (0: endless) went by without a better score. All workers agree: they know the same scores."""
        return 0 < patience <= self.scored_epoch - self.best_epoch

    def epoch_means(self) -> list[float]:
        """The epoch's losses per image so far (box, obj, cls)."""
        return [total / max(self.epoch_images, 1) for total in self.epoch_losses]

    def start_epoch(self) -> None:
        """Forgets the sums of the epoch before."""
        self.epoch_images, self.epoch_losses = 0, [0.0, 0.0, 0.0]

    def state_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave; a figure that an earlier version did not have stays as it is."""
        for name, value in state.items():
            setattr(self, name, value)


class TrainState:
    """The parts of a run, each under a name. A part registers itself with ``add``; the rest knows parts only as Stateful."""

    def __init__(self, **parts: Stateful) -> None:
        self._parts: dict[str, Stateful] = dict(parts)

    def add(self, name: str, part: Stateful) -> None:
        """Registers a part; its state travels with every checkpoint from now on."""
        if name in self._parts:
            raise ValueError(f"two parts of the state are called {name!r}")
        self._parts[name] = part

    def state_dict(self) -> dict[str, Any]:
        """The state of every part by its name; tensors are the live ones."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def missing_from(self, state: dict[str, Any]) -> list[str]:
        """The parts that ``state`` lacks."""
        return [name for name in self._parts if name not in state]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores every part (KeyError: the state lacks one)."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def figures(self) -> dict[str, Any]:
        """The state of the parts that change between updates too: counters, mostly."""
        return {name: part.state_dict() for name, part in self._parts.items() if name not in IN_UPDATES}

    def load_figures(self, figures: dict[str, Any]) -> None:
        """Takes back what ``figures`` gave."""
        for name, state in figures.items():
            self._parts[name].load_state_dict(state)


class Position(NamedTuple):
    """How far a worker is; a larger one is further. Updates that were left out count too, since they used up images."""

    returns: int  # to an earlier state, after updates that were not finite
    last_update_step: int
    epoch: int


class Standing:
    """The last complete update of this worker, to which it goes back when a step after it can't be completed.

    Weights, optimizer, EMA and residuals change in updates alone. What changes on the way to one, counters and the statistics of BatchNorm layers,
    is kept here.
    """

    def __init__(self, state: TrainState, model: nn.Module) -> None:
        self._state = state
        self._live = list(model.buffers())
        self.buffers = [buffer.clone() for buffer in self._live]
        self.figures = state.figures()

    @property
    def position(self) -> Position:
        """Where that is."""
        progress = self.figures["progress"]
        return Position(progress["returns"], progress["last_update_step"], self.figures["sampler"]["epoch"])

    @property
    def update(self) -> int:
        """Updates that were used up to there."""
        return self.figures["progress"]["update"]

    def mark(self) -> None:
        """What is now is what to go back to."""
        self.figures = self._state.figures()
        torch._foreach_copy_(self.buffers, self._live)

    def go_back(self) -> None:
        """Counters and statistics as they were when ``mark`` was called."""
        self._state.load_figures(copy.deepcopy(self.figures))
        torch._foreach_copy_(self._live, self.buffers)
