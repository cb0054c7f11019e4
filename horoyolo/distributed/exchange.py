"""From gradients of this worker to gradients summed over all workers, while backward still runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from horoyolo.distributed.buckets import Bucket, build_buckets
from horoyolo.distributed.comm import Comm


class Pending(Protocol):
    """A bucket under way."""

    def proceed(self) -> None:
        """Wait for the first of two rounds and begin the second; does nothing where there is one round."""

    def finish(self) -> int:
        """Return when the bucket holds the sum over workers; gives the bytes that this worker sent."""


class Compressor(Protocol):
    """How buckets are summed over workers; the contract and its laws are in ``horoyolo.compression.base``."""

    def start(self, bucket: Bucket, comm: Comm) -> Pending:
        """Begin to replace ``bucket.flat`` by its sum over workers."""

    def commit(self) -> None:
        """The update's sums are finite and will be used: state moves on."""

    def discard(self) -> None:
        """The update is left out: state is again what it was before."""

    def overlap(self) -> bool:
        """Whether buckets should leave while backward runs in the next update."""

    def settled(self) -> bool:
        """Whether that is how it stays, as far as is known."""

    def measured(self, tail_s: float, backward_s: float, comm: Comm) -> None:
        """What the update just committed cost, from the start of its last backward, and that alone; collectives are allowed here."""

    def reset(self) -> None:
        """The update under way is given up; the next one may be among other workers."""


@dataclass(frozen=True)
class ExchangeStats:
    """What one exchange gave and what it cost."""

    norm: float  # 2-norm of all summed gradients together, the same on every worker; not finite: the update is to be left out
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
        optimizer.step()
        exchange.measure()  # the next update may leave in another way

    A bucket whose gradients are all there leaves at once when armed. What did not fill (unused parameters, a worker without images, which
    arms and finishes without a backward) leaves in ``finish`` with what it holds, zeros for gradients that never came.

    Where the compressor wants no overlap all buckets leave in ``finish``: better where forward and backward have collectives of their own.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        compressor: Compressor,
        comm: Comm,
        bucket_mb: float,
        alone: bool = True,
    ):
        """``alone``: no other collectives run while gradients are computed, so that Horovod's threads may give way to computing then."""
        self._parameters = list(named_parameters)
        self.buckets = build_buckets(self._parameters, bucket_mb)
        self._trained = {name for bucket in self.buckets for name, _ in bucket.params}
        self._compressor = compressor
        self._comm = comm
        self._alone = alone
        self._armed = False
        self._device = self.buckets[0].flat.device if self.buckets else torch.device("cpu")
        self._armed_s = 0.0
        self._backward: tuple[Any, Any] = (0.0, 0.0)  # when the last backward of the update began, and when it filled its last bucket
        self._loss_scale = 1.0
        self._leave_early = False
        self._missing: list[set[str]] = []  # names of the gradients that backward still owes, for each bucket
        self._pending: dict[int, Pending] = {}
        self._settled = False
        self._cost_s: tuple[float, float] | None = None  # of the update just finished: as a compressor is told
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

    def arm(self, loss_scale: float = 1.0) -> None:
        """The next backward is the last of this update: buckets may leave as they fill.

        Gradients are divided by ``loss_scale``, a power of two, before they leave: what compressors keep must not depend on it.
        Raises RuntimeError when other parameters are trained than those the exchange was built for.
        """
        if self._armed:
            raise RuntimeError("the exchange was armed twice without finish() between")
        changed = [name for name, param in self._parameters if param.requires_grad != (name in self._trained)]
        if changed:
            raise RuntimeError(f"{', '.join(changed)}: frozen or thawed since the exchange was built; close it, build it and its compressor anew")
        self._armed = True
        self._armed_s = time.perf_counter()
        began = moment(self._device)
        self._backward = (began, began)
        self._loss_scale = loss_scale
        self._leave_early = self._compressor.overlap()
        if self._device.type == "cpu" and self._alone:
            # While nothing is under way Horovod's threads only disturb those that compute: they look for work, and over MPI they poll.
            self._comm.give_way(not self._leave_early, for_good=self._compressor.settled())
        self._missing = [{name for name, _ in bucket.params} for bucket in self.buckets]

    def finish(self) -> ExchangeStats:
        """Send what has not left yet and wait for everything; afterwards every gradient is the sum over workers, the same bits on each.

        A sum that is not finite leaves the compressor as it was before the update. All workers find the same: they hold the same bits.
        No collective follows the last wait: where this returns, the update can be completed without any other worker.
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
        pending = [self._pending[index] for index in range(len(self.buckets))]
        for each in pending:
            each.proceed()
        self._settled = True
        wire_bytes = sum(each.finish() for each in pending)
        done_s = time.perf_counter()
        norm = global_norm([bucket.flat for bucket in self.buckets])
        finite = math.isfinite(norm)
        tail_s = time.perf_counter() - self._armed_s  # the norm has waited for what a GPU had still to do
        self._end(used=finite)
        self._cost_s = (tail_s, seconds_between(*self._backward)) if finite else None
        return ExchangeStats(norm, done_s - start_s, wire_bytes)

    def measure(self, comparable: bool = True) -> None:
        """Tells the compressor what the update just finished cost. Every worker must call it: there may be collectives in it.

        ``comparable``: its last backward was of as many images as most; what others cost says nothing of a way to sum, and is not told.
        """
        cost_s, self._cost_s = self._cost_s, None
        if cost_s is not None and comparable:
            self._compressor.measured(*cost_s, self._comm)

    @property
    def settled(self) -> bool:
        """Whether this worker has sent all that it sends in the update under way: others may complete it even if ``finish`` fails here."""
        return self._settled

    def reset(self, used: bool = False) -> None:
        """Gives up what is under way, gradients included, after a collective failed; communication must have been closed before.

        ``used``: others completed the update that failed here, so that what this worker keeps of it counts; only where it is ``settled``.
        """
        self._end(used)
        self._cost_s = None
        self._compressor.reset()
        self.zero_grad()

    def _end(self, used: bool) -> None:
        self._pending.clear()
        self._armed = self._settled = False
        if used:
            self._compressor.commit()
        else:
            self._compressor.discard()

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
            if not self._missing[index]:
                self._backward = (self._backward[0], moment(self._device))
                if self._leave_early:
                    self._start(index)

        return gradient_ready

    def _start(self, index: int) -> None:
        if self._loss_scale != 1:
            self.buckets[index].flat.div_(self._loss_scale)
        self._pending[index] = self._compressor.start(self.buckets[index], self._comm)


def moment(device: torch.device) -> Any:
    """Now, in the order of what a device does, for ``seconds_between``: a GPU may have queued much before."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Any, end: Any) -> float:
    """The time from one ``moment`` of a device to another, when both are over."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def global_norm(flats: list[Tensor]) -> float:
    """The 2-norm of all values together, in one pass over each buffer; finite where they are."""
    norm = _norm(flats, torch.float32)
    # Squares leave the range of float32 long before values do.
    return norm if math.isfinite(norm) else _norm(flats, torch.float64)


def _norm(flats: list[Tensor], dtype: torch.dtype) -> float:
    norms = [torch.linalg.vector_norm(flat, dtype=dtype) for flat in flats]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


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
