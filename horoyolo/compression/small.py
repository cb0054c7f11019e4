"""Small parameters in a finer form than large ones.

Scales and shifts, biases, the first layers and those of few channels are hardly any of the bytes and where an error hurts most: in a training of
YOLOv5n they made up two thirds of what one bit a value cost in loss. PowerSGD (Vogels et al. 2019) leaves vectors as they are for the first of these
reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from horoyolo.compression.base import Bucket, Comm, Lossy, Pending

SMALL = 10_000  # values of a small parameter at most: 1 % of YOLOv5s, 7 % of YOLOv5n


class SmallApart(Lossy):
    """Sums the small parameters of a bucket in one way and the large ones in another."""

    def __init__(self, small: Lossy, large: Lossy):
        super().__init__()
        self._small = small
        self._large = large

    @property
    def warm(self) -> bool:
        return self._small.warm and self._large.warm

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> Pending:
        """Begin with both; the parameters of a bucket lie in rising order of size."""
        num_small = sum(param.numel() <= SMALL for _, param in bucket.params)
        values = sum(param.numel() for _, param in bucket.params[:num_small])
        halves = [(self._small, slice(num_small), slice(values), "small"), (self._large, slice(num_small, None), slice(values, None), "large")]
        pending = []
        for lossy, part, span, name in halves:
            if bucket.params[part]:
                half = _Half(f"{bucket.name}.{name}", bucket.flat[span], bucket.params[part], bucket.grads[part])
                pending.append(lossy.start(half, comm, residual[span]))
        return _Both(pending)

    def commit(self) -> None:
        self._small.commit()
        self._large.commit()
        super().commit()

    def discard(self) -> None:
        self._small.discard()
        self._large.discard()

    def reset(self) -> None:
        self._small.reset()
        self._large.reset()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "small": self._small.state_dict(), "large": self._large.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._small.load_state_dict(state["small"])
        self._large.load_state_dict(state["large"])


@dataclass(frozen=True)
class _Half:
    """A part of a bucket, as a bucket."""

    name: str
    flat: Tensor
    params: list[tuple[str, nn.Parameter]]
    grads: list[Tensor]


@dataclass(frozen=True)
class _Both:
    pending: list[Pending]

    def proceed(self) -> None:
        for each in self.pending:
            each.proceed()

    def finish(self) -> int:
        return sum(each.finish() for each in self.pending)
