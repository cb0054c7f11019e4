"""What a lossy compressor leaves out of one update goes into the next.

Error feedback (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"): residuals live here alone, a flat
buffer a bucket, outside of ``p.grad``, and belong to their rank. There are two buffers, for the last update and for the one under way: an
update that is left out changes nothing, and after a failure workers can stand at either of two neighbouring updates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Compressor, Lossy, Pending


class ErrorFeedback(Compressor):
    """Makes a compressor of a lossy way to sum: adds the residual to a bucket before it leaves, and keeps the new one."""

    def __init__(self, lossy: Lossy):
        self.lossy = lossy
        self._buckets: dict[str, Bucket] = {}  # those that were seen, by name
        self._kept: dict[str, Tensor] = {}  # residuals after the last update that was used, by bucket
        self._next: dict[str, Tensor] = {}  # residuals of the update under way
        self._loaded: dict[str, Tensor] = {}  # by parameter, until its bucket is seen

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        """Begin to replace the bucket by (about) its sum, residuals included."""
        if bucket.name not in self._buckets:
            self._meet(bucket)
        bucket.flat.add_(self._kept[bucket.name])
        if comm.size() == 1:  # nobody to send to: nothing is left out
            self._next[bucket.name].zero_()
            return _Alone()
        return self.lossy.start(bucket, comm, self._next[bucket.name])

    def commit(self) -> None:
        self._kept, self._next = self._next, self._kept
        self.lossy.commit()

    def discard(self) -> None:
        self.lossy.discard()

    def state_dict(self) -> dict[str, Any]:
        return self.lossy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lossy.load_state_dict(state)

    def rank_state_dict(self) -> dict[str, Tensor]:
        """Residuals by parameter name."""
        residuals = dict(self._loaded)
        for bucket in self._buckets.values():
            for (name, _), part in zip(bucket.params, _views(bucket, self._kept[bucket.name]), strict=True):
                residuals[name] = part.clone(memory_format=torch.contiguous_format)
        return residuals

    def load_rank_state_dict(self, state: dict[str, Tensor]) -> None:
        self._loaded = dict(state)
        for bucket in self._buckets.values():
            self._take_loaded(bucket)

    def _meet(self, bucket: Bucket) -> None:
        self._buckets[bucket.name] = bucket
        self._kept[bucket.name] = torch.zeros_like(bucket.flat)
        self._next[bucket.name] = torch.zeros_like(bucket.flat)
        self._take_loaded(bucket)

    def _take_loaded(self, bucket: Bucket) -> None:
        kept = self._kept[bucket.name].zero_()
        for (name, _), part in zip(bucket.params, _views(bucket, kept), strict=True):
            if name in self._loaded:
                part.copy_(self._loaded.pop(name))


class _Alone:
    def proceed(self) -> None:
        pass

    def finish(self) -> int:
        return 0


def _views(bucket: Bucket, flat: Tensor) -> list[Tensor]:
    """The parts of ``flat``, laid out as the bucket is, that belong to its parameters."""
    return [flat.as_strided(grad.shape, grad.stride(), grad.storage_offset()) for grad in bucket.grads]
