"""Gradients as products of two thin matrices, of which one travels in an update.

PowerSGD (Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization") follows the leading singular
directions of each weight's gradient by power iteration: one step of it an update, from where the last one ended. Its two factors are two
dependent rounds on the network. ACP-SGD (Zhang et al. 2023, "Evaluation and Optimization of Gradient Compression for Distributed Deep Learning")
takes them in turns, one round an update: with a basis Q of the inputs, orthonormal and the same on all workers, it sums P = M Q over workers and
takes P Q^T for the sum of M; the next update draws its basis from that P and sends M^T P.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from horoyolo.compression.base import Bucket, Comm, Lossy, Pending, ring_bytes

Side = Literal["outputs", "inputs"]

HEADROOM = 2.0**16  # factors travel divided by it: a sum along a row can be larger than the row's values by the root of its length
NOISE = 1e-12  # of a factor's largest value, far below its rounding: it shows only where a factor has no direction of its own
NARROW = 64  # fewer outputs or inputs than these: as it is. With vectors they are 0.5 % of YOLOv5s, and those of the head lag behind in training
MIN_SAVING = 8  # times less of a matrix; smaller savings are not worth its error


class PowerSGD(Lossy):
    """Sends weights as factors of ``rank`` rows, and what would not become clearly smaller as it is, all in one allreduce a bucket.

    A factor is kept in logical order, (rank, out) or (rank, in, kernel height, kernel width), so that it serves any memory format.
    """

    def __init__(self, rank: int):
        super().__init__()
        self._rank = rank
        self._factors: dict[str, Tensor] = {}  # summed in the last update that was used, by parameter
        self._staged: dict[str, Tensor] = {}  # summed in the update under way
        self._noise: dict[int, Tensor] = {}  # by length of its rows

    def start(self, bucket: Bucket, comm: Comm, residual: Tensor) -> Pending:
        """Send the factors of all matrices together with what goes as it is."""
        sent, known = _sides(self.update)
        matrices, dense = _split(bucket, self._rank)
        shapes: list[tuple[int, ...]] = [(span.stop - span.start,) for span in dense] + [(self._rank, matrix.length(sent)) for matrix in matrices]
        payload = bucket.flat.new_empty(sum(math.prod(shape) for shape in shapes))
        parts = _parts(payload, shapes)
        for span, part in zip(dense, parts, strict=False):
            part.copy_(bucket.flat[span])
        bases = self._bases(matrices, known, bucket.flat.device)
        for matrix, basis, factor in zip(matrices, bases, parts[len(dense) :], strict=True):
            torch.mm(basis, matrix.towards(sent, bucket.flat), out=factor)
        own = payload.clone()
        # Each side has its name: Horovod would agree anew on every change of a shape.
        handle = comm.allreduce_async(payload, f"{bucket.name}.{sent}")
        expanders = torch._foreach_mul(bases, HEADROOM**2) if bases else ()
        return _LowRankPending(bucket.flat, residual, sent, dense, matrices, shapes, expanders, own, handle, self._staged, comm.size())

    def commit(self) -> None:
        super().commit()
        self._factors.update(self._staged)
        self._staged.clear()

    def discard(self) -> None:
        self._staged.clear()

    def state_dict(self) -> dict[str, Any]:
        factors = {name: factor.clone(memory_format=torch.contiguous_format) for name, factor in self._factors.items()}
        return {**super().state_dict(), "factors": factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._factors = dict(state["factors"])
        self._staged.clear()

    def _bases(self, matrices: Sequence[_Matrix], side: Side, device: torch.device) -> list[Tensor]:
        """For each matrix rows (rank, length of the side) in memory order: orthonormal but for division by HEADROOM, they span its last factor.

        They are divided before anything is projected on them, so that no partial sum overflows.
        """
        by_length: dict[int, list[_Matrix]] = defaultdict(list)
        for matrix in matrices:
            by_length[matrix.length(side)].append(matrix)
        bases = {}
        for length, group in by_length.items():
            if length not in self._noise:
                draws = torch.Generator().manual_seed(length)
                self._noise[length] = torch.randn(self._rank, length, dtype=torch.float64, generator=draws).mul_(NOISE).to(device)
            factors = torch.zeros(len(group), self._rank, length, dtype=torch.float64, device=device)
            for matrix, factor in zip(group, factors, strict=True):
                last = self._factors.get(matrix.name)
                # Of another rank, or of the other side after updates without exchange (one worker), it is of no use.
                if last is not None and last.shape == (self._rank, *matrix.dims(side)):
                    factor.view(last.shape).copy_(last)
            rows = orthonormal_rows(factors, self._noise[length]).div_(HEADROOM).float()
            for matrix, basis in zip(group, rows, strict=True):
                bases[matrix.name] = matrix.to_memory(side, basis)
        return [bases[matrix.name] for matrix in matrices]


@dataclass(frozen=True)
class _LowRankPending:
    flat: Tensor  # the bucket's
    residual: Tensor
    sent: Side
    dense: list[slice]
    matrices: list[_Matrix]
    shapes: list[tuple[int, ...]]  # of the payload's parts: what is dense, then factors
    expanders: Sequence[Tensor]  # (rank, length of the other side): transposed times a factor of the payload they give the matrix
    own: Tensor  # this worker's payload
    handle: Any
    staged: dict[str, Tensor]
    size: int

    def proceed(self) -> None:
        """There is one round: what was not sent is worked out while it is on its way."""
        for span in self.dense:
            self.residual[span] = 0
        factors = _parts(self.own, self.shapes)[len(self.dense) :]
        for matrix, expander, factor in zip(self.matrices, self.expanders, factors, strict=True):
            gradient, left = matrix.towards(self.sent, self.flat), matrix.towards(self.sent, self.residual)
            torch.addmm(gradient, expander.t(), factor, alpha=-1, out=left)

    def finish(self) -> int:
        parts = _parts(self.handle.wait(), self.shapes)
        for span, part in zip(self.dense, parts, strict=False):
            self.flat[span] = part
        for matrix, expander, factor in zip(self.matrices, self.expanders, parts[len(self.dense) :], strict=True):
            torch.mm(expander.t(), factor, out=matrix.towards(self.sent, self.flat))
            self.staged[matrix.name] = matrix.to_logical(self.sent, factor)
        return ring_bytes(self.own.numel() * self.own.element_size(), self.size)


@dataclass(frozen=True)
class _Matrix:
    """A weight (out, in, ...) in a bucket as a matrix of outputs by inputs, which lie in some order in memory."""

    name: str
    span: slice  # of the bucket
    shape: torch.Size
    order: tuple[int, ...]  # of the inputs' dimensions in memory, outermost first

    def dims(self, side: Side) -> torch.Size:
        return self.shape[:1] if side == "outputs" else self.shape[1:]

    def length(self, side: Side) -> int:
        return self.dims(side).numel()

    def towards(self, side: Side, flat: Tensor) -> Tensor:
        """The view of a flat buffer as a matrix whose columns belong to the side."""
        matrix = flat[self.span].view(self.shape[0], -1)
        return matrix.t() if side == "outputs" else matrix

    def to_memory(self, side: Side, factor: Tensor) -> Tensor:
        """(rank, length) from logical order to that in memory."""
        if side == "outputs":
            return factor
        return factor.view(-1, *self.shape[1:]).permute(0, *self.order).reshape(factor.shape)

    def to_logical(self, side: Side, factor: Tensor) -> Tensor:
        """(rank, length) in the order of memory to (rank, out) or (rank, in, ...), without a copy."""
        if side == "outputs":
            return factor
        in_memory = factor.view(-1, *(self.shape[dim] for dim in self.order))
        return in_memory.permute(0, *(1 + self.order.index(dim) for dim in range(1, len(self.shape))))


def orthonormal_rows(factors: Tensor, noise: Tensor) -> Tensor:
    """(batch, rank, length) float64 to rows with the same span that are orthonormal in each matrix of the batch.

    Directions that a factor lacks, since it is zero or its rows depend on each other, come from ``noise`` (rank, length), which is far smaller
    than 1: a direction lost once would never come back otherwise.
    """
    largest = factors.abs().amax((1, 2), keepdim=True).clamp_(min=1e-300)
    return torch.linalg.qr((factors / largest + noise).mT).Q.mT


def _sides(update: int) -> tuple[Side, Side]:
    """Which side's factor an update sends, and which it has a basis of."""
    return ("outputs", "inputs") if update % 2 == 0 else ("inputs", "outputs")


def _split(bucket: Bucket, rank: int) -> tuple[list[_Matrix], list[slice]]:
    """The matrices of a bucket, and the spans of all else, neighbours in one."""
    matrices: list[_Matrix] = []
    dense: list[slice] = []
    start = 0
    for (name, _), grad in zip(bucket.params, bucket.grads, strict=True):
        inputs = grad.shape[1:].numel()
        span = slice(start, start + grad.numel())
        start = span.stop
        # The outputs must be outermost in memory, as they are in all of PyTorch's memory formats, for the rest to be one dimension.
        if grad.ndim > 1 and min(len(grad), inputs) >= max(NARROW, MIN_SAVING * rank) and grad.stride(0) == inputs:
            matrices.append(_Matrix(name, span, grad.shape, tuple(sorted(range(1, grad.ndim), key=grad.stride, reverse=True))))
        elif dense and dense[-1].stop == span.start:
            dense[-1] = slice(dense[-1].start, span.stop)
        else:
            dense.append(span)
    return matrices, dense


def _parts(payload: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The views of a payload with these shapes, one after the other."""
    return [part.view(shape) for part, shape in zip(payload.split([math.prod(shape) for shape in shapes]), shapes, strict=True)]
