"""The laws of the contract, as functions of what workers saw: run over threads (with hypothesis) and over real Horovod workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from horoyolo.compression.base import Compressor
from horoyolo.distributed.buckets import Bucket, build_buckets

# Parameters of these tests are smaller than real ones, and are to be sent in all forms: these stand in for the constants of the same names.
SMALL = 300
NARROW, MIN_SAVING = 8, 4
KINDS = ("normal", "zero", "tiny", "huge", "sparse", "mixed", "equal")


def values(kind: str, numel: int, generator: torch.Generator) -> Tensor:
    """Gradients of a kind; huge ones whose sum over four workers is still a float32."""
    normal = torch.randn(numel, generator=generator)
    if kind == "zero":
        return torch.zeros(numel)
    if kind == "tiny":
        return normal * 1e-38
    if kind == "huge":
        return normal.clamp(-3, 3) * 1e36
    if kind == "sparse":
        return normal * (torch.rand(numel, generator=generator) < 0.02)
    if kind == "mixed":  # layers differ by orders of magnitude, as real gradients do
        return normal * 10 ** (torch.rand(numel, generator=generator) * 8 - 6)
    if kind == "equal":
        return torch.full((numel,), 0.25)
    return normal


def buckets_of(shapes: list[tuple[int, ...]], channels_last: bool = False, bucket_mb: float = 1.0) -> list[Bucket]:
    """Buckets of parameters with these shapes."""
    params = []
    for index, shape in enumerate(shapes):
        tensor = torch.zeros(shape)
        if channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        params.append((f"p{index}", nn.Parameter(tensor)))
    return build_buckets(params, bucket_mb)


@dataclass
class Round:
    """What one worker saw of one update of one bucket."""

    gradient: Tensor
    residual_before: Tensor
    residual_after: Tensor
    result: Tensor
    declared_bytes: int


def flat_residual(compressor: Compressor, bucket: Bucket) -> Tensor:
    """The residuals of a bucket's parameters (logical order), zeros where there is none."""
    state = compressor.rank_state_dict()
    return torch.cat([state.get(name, torch.zeros(param.shape)).reshape(-1) for name, param in bucket.params])


def flat_logical(bucket: Bucket) -> Tensor:
    """What the bucket holds, parameter by parameter, each in its logical order."""
    return torch.cat([grad.reshape(-1) for grad in bucket.grads]).clone()


def take_update(compressor: Compressor, buckets: list[Bucket], gradients: list[Tensor], comm: Any, commit: bool = True) -> list[Round]:
    """One update of all buckets with these gradients (in the order of the buffer); committed only when asked to and when all is finite."""
    before = [flat_residual(compressor, bucket) for bucket in buckets]
    for bucket, gradient in zip(buckets, gradients, strict=True):
        bucket.flat.copy_(gradient)
    sent = [flat_logical(bucket) for bucket in buckets]
    pending = [compressor.start(bucket, comm) for bucket in buckets]
    for each in pending:
        each.proceed()
    declared = [each.finish() for each in pending]
    if commit and all(bool(torch.isfinite(bucket.flat).all()) for bucket in buckets):
        compressor.commit()
    else:
        compressor.discard()
    return [
        Round(gradient, old, flat_residual(compressor, bucket), flat_logical(bucket), num_bytes)
        for bucket, gradient, old, num_bytes in zip(buckets, sent, before, declared, strict=True)
    ]


def check_same_bits(rounds: list[Round]) -> None:
    """The result has the same bits on every worker (NaN included)."""
    for other in rounds[1:]:
        assert torch.equal(rounds[0].result.view(torch.int32), other.result.view(torch.int32)), "workers got different sums"


def check_conservation(rounds: list[Round], relative: float = 3e-6) -> None:
    """Sum of gradients and old residuals = result + sum of new residuals, within the rounding of float32 at each bucket's scale."""
    given = sum(r.gradient.double() + r.residual_before.double() for r in rounds)
    got = rounds[0].result.double() + sum(r.residual_after.double() for r in rounds)
    scale = max(float(torch.stack([r.gradient.abs() + r.residual_before.abs() for r in rounds]).max()), 1e-36) if given.numel() else 1.0
    error = float((given - got).abs().max()) if given.numel() else 0.0
    assert error <= relative * len(rounds) * scale, f"{error:g} of {scale:g} got lost or was made up"
