from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import buckets_of, flat_logical, take_update
from threads import ThreadComm, run_threads
from torch import Tensor

from horoyolo.compression import powersgd
from horoyolo.compression.base import ring_bytes
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.powersgd import NOISE, PowerSGD, orthonormal_rows
from horoyolo.distributed.buckets import Bucket, build_buckets
from horoyolo.model.yolo import build_model

OF_MODELS = powersgd.NARROW, powersgd.MIN_SAVING  # tests have others: conftest.py


def low_rank(shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns, rows = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, torch.Size(shape[1:]).numel(), generator=generator)
    return (columns @ rows).view(shape)


def sums(lossy: PowerSGD, bucket: Bucket, gradients: list[Tensor], comm: ThreadComm, used: bool = True) -> list[Tensor]:
    """Sums over workers of a gradient for each parameter, without error feedback."""
    for view, gradient in zip(bucket.grads, gradients, strict=True):
        view.copy_(gradient)
    pending = lossy.start(bucket, comm, torch.full_like(bucket.flat, float("nan")))
    pending.proceed()
    pending.finish()
    lossy.commit() if used else lossy.discard()
    return [view.clone(memory_format=torch.contiguous_format) for view in bucket.grads]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def alone(work: Callable[[ThreadComm], None]) -> None:
    """Run on one worker, who then sums over himself: what error feedback would not even start."""
    run_threads(1, work)


def test_sums_of_low_rank_come_exactly_at_the_second_update():
    """Each of many equal shapes by itself, whatever its scale: a norm over the whole batch would keep it from getting there."""
    shapes = [(16, 6, 3, 3)] * 3 + [(24, 30)] * 4
    scales = [1.0, 1e-6, 1e6, 3.0, 1e-3, 1.0, 1e3]

    def of(rank: int) -> list[Tensor]:  # rank 1 on each of two workers: their sum is of rank 2
        return [scale * low_rank(shape, 1, 10 * index + rank) for index, (shape, scale) in enumerate(zip(shapes, scales, strict=True))]

    def work(comm: ThreadComm) -> list[Tensor]:
        (bucket,) = buckets_of(shapes, channels_last=True)
        lossy, gradients = PowerSGD(2), of(comm.rank())[::-1]  # buckets are filled in reverse order, small ones first
        return [sums(lossy, bucket, gradients, comm) for _ in range(2)][-1][::-1]

    for got in run_threads(2, work):
        for mine, first, second in zip(got, of(0), of(1), strict=True):
            assert relative_error(mine, first + second) < 2e-5


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (32, 6, 3, 3)])
def test_warm_start_converges_to_the_best_approximation(shape):
    def work(comm: ThreadComm) -> None:
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        singular = torch.linalg.svdvals(gradient.view(shape[0], -1))
        best = float(singular[3:].norm() / singular.norm())
        (bucket,), lossy = buckets_of([shape]), PowerSGD(3)
        errors = [relative_error(sums(lossy, bucket, [gradient], comm)[0], gradient) for _ in range(80)]
        assert errors[0] > 1.05 * best  # or the test would show nothing
        assert errors[-1] < 1.005 * best

    alone(work)


def test_rows_become_orthonormal_in_each_matrix_and_keep_their_span():
    factors = torch.randn(7, 4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors[1] = 0
    factors[2, 3] = 0
    factors[3, 1] = 2 * factors[3, 0]
    factors[4] *= 1e-45
    factors[5] *= 1e38
    factors[6, 1:] *= 1e-4
    noise = NOISE * torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bases = orthonormal_rows(factors, noise)
    torch.testing.assert_close(bases @ bases.mT, torch.eye(4, dtype=torch.float64).expand(7, 4, 4))
    left = factors - factors @ bases.mT @ bases
    assert (left.norm(dim=(1, 2)) <= 1e-6 * factors.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("before", [torch.zeros(20, 30), low_rank((20, 30), 1, 1), torch.ones(20, 1) * (torch.arange(30) == 3)])
def test_directions_that_were_lost_come_back(before):
    """After gradients of rank 0 or 1 the next one is not held to what they had, wherever its values are."""

    def work(comm: ThreadComm) -> None:
        (bucket,), lossy, gradient = buckets_of([(20, 30)]), PowerSGD(2), torch.zeros(20, 30)
        gradient[10:, 10:] = low_rank((10, 20), 2, 2)
        for _ in range(4):
            sums(lossy, bucket, [before], comm)
        for _ in range(3):
            (got,) = sums(lossy, bucket, [gradient], comm)
        assert relative_error(got, gradient) < 1e-5

    alone(work)


def test_layouts_agree_and_take_over_each_others_state():
    shapes = [(30,), (9, 1, 3, 3), (20, 12, 1, 1), (12, 40), (16, 9, 3, 3)]  # in rising order of size, as in a bucket

    def work(comm: ThreadComm) -> None:
        generator = torch.Generator().manual_seed(comm.rank())
        gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(7)]
        nchw, nhwc, heir = ErrorFeedback(PowerSGD(2)), ErrorFeedback(PowerSGD(2)), ErrorFeedback(PowerSGD(2))

        def result(compressor: ErrorFeedback, bucket: Bucket, of_update: list[Tensor]) -> Tensor:
            flat = torch.zeros_like(bucket.flat)
            for view, gradient in zip(bucket.grads, of_update, strict=True):
                flat.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(gradient)
            return take_update(compressor, [bucket], [flat], comm)[0].result

        (plain,), (channels_last,) = buckets_of(shapes), buckets_of(shapes, channels_last=True)
        for index, of_update in enumerate(gradients):
            expected = result(nhwc, channels_last, of_update)
            torch.testing.assert_close(result(nchw, plain, of_update), expected, rtol=1e-3, atol=1e-4)
            if index >= 4:
                torch.testing.assert_close(result(heir, plain, of_update), expected, rtol=1e-3, atol=1e-4)
            if index == 3 or index == 4:  # one of each side's factors
                heir.load_state_dict(nhwc.state_dict())
                heir.load_rank_state_dict(nhwc.rank_state_dict())

    run_threads(2, work)


def test_factors_are_those_of_all_workers_and_of_used_updates_alone():
    def work(comm: ThreadComm) -> list[dict]:
        (bucket,), lossy = buckets_of([(12, 20), (16, 4, 3, 3)]), PowerSGD(2)
        generator, states = torch.Generator().manual_seed(comm.rank()), []
        for used in (True, False, True, False):
            sums(lossy, bucket, [torch.randn(grad.shape, generator=generator) for grad in bucket.grads], comm, used)
            states.append(lossy.state_dict())
        return states

    first, second = run_threads(2, work)
    for left, right in zip(first, second, strict=True):
        assert left["update"] == right["update"]
        assert all(torch.equal(left["factors"][name], right["factors"][name]) for name in ("p0", "p1"))
    assert {name: tuple(factor.shape) for name, factor in first[0]["factors"].items()} == {"p0": (2, 12), "p1": (2, 16)}
    assert {name: tuple(factor.shape) for name, factor in first[2]["factors"].items()} == {"p0": (2, 20), "p1": (2, 4, 3, 3)}
    for used, discarded in ((0, 1), (2, 3)):
        assert all(torch.equal(factor, first[discarded]["factors"][name]) for name, factor in first[used]["factors"].items())


def test_a_factor_of_the_wrong_side_or_rank_counts_as_none():
    """As after updates of a job that was one worker for a while, or with a saved state of another rank."""

    def work(comm: ThreadComm) -> None:
        (bucket,), lossy, gradient = buckets_of([(20, 30)]), PowerSGD(2), low_rank((20, 30), 2, 0)
        sums(lossy, bucket, [gradient], comm)
        lossy.commit()
        for _ in range(2):
            (got,) = sums(lossy, bucket, [gradient], comm)
        assert relative_error(got, gradient) < 1e-5
        other = PowerSGD(3)
        other.load_state_dict(lossy.state_dict())
        for _ in range(2):
            (got,) = sums(other, bucket, [gradient], comm)
        assert relative_error(got, gradient) < 1e-5

    alone(work)


@pytest.mark.parametrize("scale", [3e36, 1e-30])
def test_sums_along_rows_and_over_workers_stay_in_range(scale):
    """64 rows of 4096 times 3e36 on four workers: a float32 holds the sum of the gradients, but not of their projections."""

    def work(comm: ThreadComm) -> Tensor:
        (bucket,), lossy = buckets_of([(64, 4096)], bucket_mb=2.0), PowerSGD(1)
        return [sums(lossy, bucket, [torch.full((64, 4096), scale)], comm)[0] for _ in range(3)][-1]

    torch.testing.assert_close(run_threads(4, work)[0], torch.full((64, 4096), 4 * scale), rtol=1e-5, atol=0)


def test_what_is_small_goes_as_it_is_with_the_factors_in_one_allreduce():
    names = []

    class Counting(ThreadComm):
        def allreduce_async(self, tensor, name, op="sum"):
            names.append((name, tensor.numel()))
            return super().allreduce_async(tensor, name, op)

    def work(comm: ThreadComm) -> list[int]:
        comm.__class__ = Counting
        (bucket,), lossy = buckets_of([(3, 3), (40,), (16, 32), (8, 8, 3, 3), (7, 100)]), PowerSGD(2)
        bucket.flat.fill_(float(comm.rank() + 1))
        residual, declared = torch.empty_like(bucket.flat), []
        for _ in range(3):
            bucket.flat.normal_(generator=torch.Generator().manual_seed(comm.rank()))
            given = [grad.clone() for grad in bucket.grads]
            pending = lossy.start(bucket, comm, residual)
            pending.proceed()
            declared.append(pending.finish())
            lossy.commit()
            left = residual.split([grad.numel() for grad in bucket.grads])
            assert [bool(part.any()) for part in left] == [False, False, True, True, False]
            if comm.size() == 1:
                assert all(torch.equal(bucket.grads[index], given[index]) for index in (0, 1, 4))
        return declared

    dense = 9 + 700 + 40
    outputs, inputs = dense + 2 * (8 + 16), dense + 2 * (72 + 32)
    assert run_threads(1, work) == [[0, 0, 0]]
    assert names == [("bucket.0.outputs", outputs), ("bucket.0.inputs", inputs), ("bucket.0.outputs", outputs)]
    assert run_threads(3, work) == [[ring_bytes(4 * numel, 3) for numel in (outputs, inputs, outputs)]] * 3


@pytest.fixture(scope="module")
def yolov5s_buckets():
    return build_buckets(build_model("yolov5s", 80).named_parameters(), 25.0)


@pytest.mark.parametrize(("rank", "times_fewer"), [(1, 120), (2, 90), (4, 58), (8, 35)])
def test_yolov5s_needs_many_times_fewer_bytes(monkeypatch, yolov5s_buckets, rank, times_fewer):
    monkeypatch.setattr(powersgd, "NARROW", OF_MODELS[0])
    monkeypatch.setattr(powersgd, "MIN_SAVING", OF_MODELS[1])

    class TwoWorkers(ThreadComm):
        def size(self) -> int:
            return 2

        def allreduce_async(self, tensor, name, op="sum"):
            return super()._exchange(tensor, name, lambda tensors: tensors[0])

    def work(comm: ThreadComm) -> None:
        comm.__class__ = TwoWorkers
        lossy, declared = PowerSGD(rank), 0
        for _ in range(2):
            pending = [lossy.start(bucket, comm, torch.empty_like(bucket.flat)) for bucket in yolov5s_buckets]
            declared += sum(each.finish() for each in pending)
            lossy.commit()
        plain = sum(ring_bytes(4 * bucket.flat.numel(), 2) for bucket in yolov5s_buckets)
        assert 2 * plain > times_fewer * declared
        assert all(not flat_logical(bucket).any() for bucket in yolov5s_buckets)

    alone(work)
