"""Small parameters of a bucket in one form and large ones in another."""

from __future__ import annotations

import pytest
import torch
from laws import SMALL, buckets_of, take_update
from threads import ThreadComm, run_threads
from torch import Tensor

from horoyolo.compression.base import Lossy
from horoyolo.compression.build import build_compressor
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.quantize import BFloat16, OneBit
from horoyolo.compression.scatter import Scatter
from horoyolo.compression.small import SmallApart
from horoyolo.config import Comms

LARGE_SHAPES, SMALL_SHAPES = [(24, 30), (8, 6, 3, 3)], [(10, 30), (70,), (1,)]
ONE_BIT, FINE = OneBit(64), BFloat16()


def sums_of(lossy: Lossy, shapes: list[tuple[int, ...]], gradients: list[list[Tensor]]) -> list[Tensor]:
    """What two workers get of some updates of one bucket, and the first one's residual at the end."""

    def work(comm: ThreadComm) -> list[Tensor]:
        compressor, buckets = ErrorFeedback(lossy if comm.rank() == 0 else twin(lossy)), buckets_of(shapes)
        rounds = [take_update(compressor, buckets, [gradient[comm.rank()]], comm)[0] for gradient in gradients]
        return [*(round_.result for round_ in rounds), rounds[-1].residual_after]

    return run_threads(2, work)[0]


def twin(lossy: Lossy) -> Lossy:
    if isinstance(lossy, SmallApart):
        return SmallApart(twin(lossy._small), twin(lossy._large))
    assert isinstance(lossy, Scatter)
    return Scatter(lossy._codec)


def of(shapes: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """Gradients of three updates for two workers."""
    numel = sum(map(_numel, shapes))
    return [list(torch.randn(2, numel, generator=torch.Generator().manual_seed(update))) for update in range(3)]


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_each_half_is_summed_as_if_it_were_alone():
    gradients = of(LARGE_SHAPES + SMALL_SHAPES)
    num_small = sum(map(_numel, SMALL_SHAPES))
    both = sums_of(SmallApart(Scatter(FINE), Scatter(ONE_BIT)), LARGE_SHAPES + SMALL_SHAPES, gradients)
    small = sums_of(Scatter(FINE), SMALL_SHAPES, [[own[:num_small] for own in update] for update in gradients])
    large = sums_of(Scatter(ONE_BIT), LARGE_SHAPES, [[own[num_small:] for own in update] for update in gradients])
    assert min(map(_numel, LARGE_SHAPES)) > SMALL >= max(map(_numel, SMALL_SHAPES))
    for got, of_large, of_small in zip(both, large, small, strict=True):
        assert torch.equal(got, torch.cat([of_small, of_large]))


@pytest.mark.parametrize(("shapes", "alone"), [(LARGE_SHAPES, ONE_BIT), (SMALL_SHAPES, FINE)])
def test_a_bucket_of_one_kind_is_summed_in_that_form_alone(shapes, alone):
    gradients = of(shapes)
    both = sums_of(SmallApart(Scatter(FINE), Scatter(ONE_BIT)), shapes, gradients)
    assert all(torch.equal(got, expected) for got, expected in zip(both, sums_of(Scatter(alone), shapes, gradients), strict=True))


@pytest.mark.parametrize("name", ["onebit", "topk"])
def test_small_parameters_are_nearly_exact_beside_a_coarse_sum(name):
    def work(comm: ThreadComm) -> tuple[Tensor, Tensor]:
        compressor = build_compressor(Comms(compression=name, warmup_updates=0))
        gradient = torch.randn(720 + 70, generator=torch.Generator().manual_seed(comm.rank()))
        (seen,) = take_update(compressor, buckets_of([(24, 30), (70,)]), [gradient], comm)
        return gradient, seen.result

    (first, result), (second, _) = run_threads(2, work)
    errors = [(result - first - second)[part].norm() / (first + second)[part].norm() for part in (slice(70), slice(70, None))]
    assert errors[0] < 0.02
    assert errors[1] > 0.2
