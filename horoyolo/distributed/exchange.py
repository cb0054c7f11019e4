"""From gradients of this worker to gradients summed over all workers, while backward still runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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
    """Sums the gradients of a model over workers, once an update ::

        exchange.zero_grad()  # or that of the optimizer
        for images in micro_batches:
            if last:
                exchange.arm()
            loss(images).backward()
        stats = exchange.finish()  # now every p.grad is the sum over workers, and a view into a bucket

    A bucket whose gradients are all there leaves at once when armed. What did not fill (unused parameters, a worker without images, which
    arms and finishes without a backward) leaves in ``finish`` with what it holds, zeros for gradients that never came.

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
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._gradient_hook(index, name, grad))
            for index, bucket in enumerate(self.buckets)
            for (name, param), grad in zip(bucket.params, bucket.grads, strict=True)
        ]

    def zero_grad(self) -> None:
        """Forget all gradients: the first backward afterwards writes them into the buckets, later ones add to them there."""
        for bucket in self.buckets:
            for _, param in bucket.params:
                param.grad = None

    def arm(self) -> None:
        """The next backward is the last of this update: buckets may leave as they fill."""
        if self._armed:
            raise RuntimeError("the exchange was armed twice without finish() between")
        self._armed = True
        self._missing = [{name for name, _ in bucket.params} for bucket in self.buckets]

    def finish(self) -> ExchangeStats:
        """Send what has not left yet and wait for everything; afterwards every gradient is the sum over workers, the same bits on each.

        Raises RuntimeError when the exchange was not armed.
        """
        if not self._armed:
            raise RuntimeError("finish() without arm(): the exchange would not know which gradients are complete")
        start_s = time.perf_counter()
        for index, bucket in enumerate(self.buckets):
            if index not in self._pending:
                for (_, param), grad in zip(bucket.params, bucket.grads, strict=True):
                    _place(param, grad)
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

    def _gradient_hook(self, index: int, name: str, grad: Tensor) -> Callable[[nn.Parameter], None]:
        def gradient_ready(param: nn.Parameter) -> None:
            if index in self._pending:
                raise RuntimeError(f"gradient of {name} came twice after arm(): arm before the last backward of an update only")
            _place(param, grad)
            if not self._armed:
                return
            self._missing[index].discard(name)
            if not self._missing[index] and self._overlap:
                self._start(index)

        return gradient_ready

    def _start(self, index: int) -> None:
        self._pending[index] = self._compressor.start(self.buckets[index], self._comm)


def _place(param: nn.Parameter, grad: Tensor) -> None:
    """Make ``grad``, a view into a bucket, the parameter's gradient, with the values it had.

    Copying once after backward is cheaper than zeroing the bucket before and having backward add to it.
    """
    if param.grad is grad:
        return
    if param.grad is None:
        grad.zero_()
    else:
        grad.copy_(param.grad)
    param.grad = grad
