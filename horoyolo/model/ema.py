"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A float32 copy of ``model`` that follows it: parameters and floating-point buffers alike; integer buffers are copied.

    Of ``n`` updates it averages about the last twentieth, in a run of four hundred as in one of many thousand: the decay is
    ``(1 + n) / (20 + n)``, up to ``decay``. A span in proportion to the run is the power function average of Karras et al. 2023 (arXiv
    2312.02696, section 3.1). YOLOv5's ramp, ``1 - exp(-n / 2000)``, averages nearly nothing in a run of some hundred updates.
    ``model`` is the copy, in eval mode and without gradients; ``updates`` counts the updates.
    """

    def __init__(self, model: M, decay: float = 0.9999) -> None:
        self.model: M = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards ``model``, whose tensors carry the same names."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (20 + self.updates))
        averages: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        source = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(source[name].float())
            else:
                average.copy_(source[name])
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
