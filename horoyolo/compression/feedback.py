"""What a lossy way to sum leaves out of one update goes into the next.

Error feedback (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"): residuals live here alone, a flat
buffer a bucket, outside of ``p.grad``, and belong to their rank. Those of the last update are kept while the next one is under way: an update that
is left out changes nothing, and after a failure workers can stand at either of two neighbouring updates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Compressor, Lossy, MeasuringComm, Pending


class ErrorFeedback(Compressor):
    """Makes a compressor of a way to sum: adds the residual to a bucket before it leaves, and keeps the new one. Exact sums cost it nothing."""

    def __init__(self, lossy: Lossy, overlap: bool = True):
        self.lossy = lossy
        self._overlap = overlap
        self._buckets: dict[str, Bucket] = {}  # those that were seen, by name
        self._kept: dict[str, Tensor] = {}  # residuals after the last update that was used, by bucket; zero where there is none
        self._next: dict[str, Tensor] = {}  # residuals of the update under way, likewise
        self._spare: dict[str, Tensor] = {}  # the memory of residuals that are not needed any more
        self._loaded: dict[str, Tensor] = {}  # by parameter, until its bucket is seen

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        """Begin to replace the bucket by (about) its sum, residuals included."""
        if bucket.name not in self._buckets:
            self._buckets[bucket.name] = bucket
            self._take_loaded(bucket)
        if bucket.name in self._kept:
            bucket.flat.add_(self._kept[bucket.name])
        if self.lossy.exact:
            return self.lossy.start(bucket, comm, bucket.flat.new_empty(0))
        if comm.size() == 1:  # nobody to send to: nothing is left out
            return _Alone()
        residual = self._spare.pop(bucket.name, None)
        self._next[bucket.name] = torch.empty_like(bucket.flat) if residual is None else residual
        return self.lossy.start(bucket, comm, self._next[bucket.name])

    def commit(self) -> None:
        self._spare.update(self._kept)
        self._kept, self._next = self._next, {}
        self.lossy.commit()

    def discard(self) -> None:
        self._spare.update(self._next)
        self._next = {}
        self.lossy.discard()

    def reset(self) -> None:
        self.discard()
        self.lossy.reset()

    def overlap(self) -> bool:
        return self._overlap

    def settled(self) -> bool:
        return True

    def measured(self, tail_s: float, backward_s: float, comm: MeasuringComm) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return self.lossy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lossy.load_state_dict(state)

    def rank_state_dict(self) -> dict[str, Tensor]:
        """Residuals by parameter name."""
        residuals = dict(self._loaded)
        for name, kept in self._kept.items():
            residuals.update((param, part.clone(memory_format=torch.contiguous_format)) for param, part in _views(self._buckets[name], kept))
        return residuals

    def load_rank_state_dict(self, state: dict[str, Tensor]) -> None:
        self._loaded = dict(state)
        self._kept.clear()
        for bucket in self._buckets.values():
            self._take_loaded(bucket)

    def _take_loaded(self, bucket: Bucket) -> None:
        if not any(name in self._loaded for name, _ in bucket.params):
            return
        kept = self._kept[bucket.name] = torch.zeros_like(bucket.flat)
        for name, part in _views(bucket, kept):
            if name in self._loaded:
                part.copy_(self._loaded.pop(name))


class _Alone:
    def proceed(self) -> None:
        pass

    def finish(self) -> int:
        return 0


def _views(bucket: Bucket, flat: Tensor) -> list[tuple[str, Tensor]]:
    """The parts of ``flat``, laid out as the bucket is, that belong to its parameters, with their names."""
    parts = [flat.as_strided(grad.shape, grad.stride(), grad.storage_offset()) for grad in bucket.grads]
    return [(name, part) for (name, _), part in zip(bucket.params, parts, strict=True)]
