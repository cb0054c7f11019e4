"""A lossy compressor that starts later."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Compressor, Pending
from horoyolo.compression.dense import Dense


class WarmUp(Compressor):
    """Sends the first ``updates`` updates as they are: early gradients change fastest, and an error kept from them is stale when it is sent.

    PyTorch's PowerSGD hook waits likewise (``start_powerSGD_iter``).
    """

    def __init__(self, compressor: Compressor, updates: int):
        self.compressor = compressor
        self._updates = updates
        self._done = 0
        self._dense = Dense()

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        return self._active().start(bucket, comm)

    def commit(self) -> None:
        self._active().commit()
        self._done += 1

    def discard(self) -> None:
        self._active().discard()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, "compressor": self.compressor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        self.compressor.load_state_dict(state["compressor"])

    def rank_state_dict(self) -> dict[str, Tensor]:
        return self.compressor.rank_state_dict()

    def load_rank_state_dict(self, state: dict[str, Tensor]) -> None:
        self.compressor.load_rank_state_dict(state)

    def _active(self) -> Compressor:
        return self._dense if self._done < self._updates else self.compressor
