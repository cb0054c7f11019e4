"""A lossy way to sum that starts later."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Lossy, Pending
from horoyolo.compression.dense import Dense


class WarmUp(Lossy):
    """Sends the first ``updates`` updates as they are: early gradients change fastest, and an error kept from them is stale when it is sent.

    PyTorch's PowerSGD hook waits likewise (``start_powerSGD_iter``).
    """

    def __init__(self, lossy: Lossy, updates: int):
        super().__init__()
        self._lossy = lossy
        self._updates = updates
        self._dense = Dense()

    @property
    def exact(self) -> bool:
        return self._active().exact

    @property
    def warm(self) -> bool:
        return self.update >= self._updates

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> Pending:
        return self._active().start(bucket, comm, residual)

    def commit(self) -> None:
        self._active().commit()
        super().commit()

    def discard(self) -> None:
        self._active().discard()

    def reset(self) -> None:
        self._lossy.reset()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lossy": self._lossy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._lossy.load_state_dict(state["lossy"])

    def _active(self) -> Lossy:
        return self._lossy if self.warm else self._dense
