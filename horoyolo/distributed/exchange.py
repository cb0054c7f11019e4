"""From gradients of this worker to gradients summed over all workers, while backward still runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from horoyolo.distributed.buckets import Bucket, build_buckets
from horoyolo.distributed.comm import Comm


class Pending(Protocol):
    """A bucket under way."""

    def finish(self) -> int:
        """Return when the bucket holds the sum over workers; gives the bytes that this worker sent."""


class Compressor(Protocol):
    """How a bucket is summed over workers; the entries are in ``horoyolo.compression``."""

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        """Begin to replace ``bucket.flat`` by its sum over workers."""


@dataclass(frozen=True)
class ExchangeStats:
    """What one exchange cost."""

    wait_s: float  # time in ``finish``: what backward did not hide
    wire_bytes: int  # sent by this worker


class Exchange:
    """Owns the gradients of a model and sums them over workers, once an update.

    Every ``p.grad`` is a view into a bucket and must stay that: clear gradients with ``zero_grad`` of this class, not of the optimizer. An
    update is ::

        exchange.zero_grad()
        for images in micro_batches:
            if last: exchange.arm()
            loss(images).backward()
        stats = exchange.finish()  # now every p.grad holds the sum over workers

    A bucket whose gradients are all there leaves at once when armed. What did not fill (unused parameters, a worker without images, which
    arms and finishes without a backward) leaves in ``finish`` with what it holds, zeros where nothing was added.

    With ``overlap=False`` all buckets leave in ``finish``: better where the forward and backward passes have collectives of their own.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        compressor: Compressor,
        comm: Comm,
        bucket_mb: float,
        overlap: bool = True,
    ):
        self.buckets = build_buckets(named_parameters, bucket_mb)
        self._compressor = compressor
        self._comm = comm
        self._overlap = overlap
        self._armed = False
        self._missing: list[set[str]] = []  # names of the gradients that backward still owes, for each bucket
        self._pending: dict[int, Pending] = {}
        self._hooks = []
        for index, bucket in enumerate(self.buckets):
            for (name, param), grad in zip(bucket.params, bucket.grads, strict=True):
                param.grad = grad
                self._hooks.append(param.register_post_accumulate_grad_hook(self._gradient_hook(index, name, grad)))

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for bucket in self.buckets:
            bucket.flat.zero_()

    def arm(self) -> None:
        """The next backward is the last of this update: buckets may leave as they fill."""
        if self._armed:
            raise RuntimeError("the exchange was armed twice without finish() between")
        self._armed = True
        self._missing = [{name for name, _ in bucket.params} for bucket in self.buckets]

    def finish(self) -> ExchangeStats:
        """Send what has not left yet and wait for everything; afterwards every gradient is the sum over workers, the same bits on each.

        Raises RuntimeError when the exchange was not armed or when somebody replaced a gradient.
        """
        if not self._armed:
            raise RuntimeError("finish() without arm(): the exchange would not know which gradients are complete")
        start_s = time.perf_counter()
        for index, bucket in enumerate(self.buckets):
            if index not in self._pending:
                for (name, param), grad in zip(bucket.params, bucket.grads, strict=True):
                    _check_owned(name, param, grad)
                self._start(index)
        wire_bytes = sum(self._pending[index].finish() for index in range(len(self.buckets)))
        self._pending.clear()
        self._armed = False
        return ExchangeStats(time.perf_counter() - start_s, wire_bytes)

    def close(self) -> None:
        """Remove the hooks; gradients stay where they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _gradient_hook(self, index: int, name: str, grad: Tensor):
        def gradient_ready(param: nn.Parameter) -> None:
            _check_owned(name, param, grad)
            if not self._armed:
                return
            if name not in self._missing[index]:
                raise RuntimeError(f"gradient of {name} came twice after arm(): arm before the last backward of an update only")
            self._missing[index].discard(name)
            if not self._missing[index] and self._overlap:
                self._start(index)

        return gradient_ready

    def _start(self, index: int) -> None:
        self._pending[index] = self._compressor.start(self.buckets[index], self._comm)


def _check_owned(name: str, param: nn.Parameter, grad: Tensor) -> None:
    if param.grad is not grad:
        raise RuntimeError(f"gradient of {name} left its bucket: use Exchange.zero_grad(), not zero_grad() of the model or optimizer")
