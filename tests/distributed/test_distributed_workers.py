"""Laws that need several real Horovod workers. Each kind of job is started once; of 4 workers that share 3 images one has none."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from horoyolo.distributed.comm import LOWEST_NICE

PROGRAM = Path(__file__).with_name("worker_program.py")
spec = importlib.util.spec_from_file_location("worker_program", PROGRAM)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)


@pytest.fixture(scope="module")
def job(run_workers):
    """What the workers of a job saved; each kind of job runs once."""
    return functools.cache(lambda launcher, num_workers: run_workers(PROGRAM, num_workers, launcher))


JOBS = [("horovodrun", 2), ("horovodrun", 3), ("horovodrun", 4), ("mpirun", 2)]


@pytest.fixture(scope="module", params=JOBS, ids=lambda param: "-".join(map(str, param)))
def workers(request, job):
    return job(*request.param)


def test_collectives_keep_their_contract(workers):
    size = len(workers)
    for rank, saved in enumerate(workers):
        got = saved["comm"]
        assert (got["rank"], got["size"], got["local"]) == (rank, size, (rank, size))
        assert got["sum"].shape == (2, 3, 2, 2)
        assert (got["sum"] == size * (size + 1) / 2).all()
        assert got["max"].tolist() == [size - 1, 0]
        expected_rows = [[r, r] for r in range(size) for _ in range(r)]
        for dtype, rows in got["rows"].items():
            assert str(rows.dtype) == dtype
            assert_close(rows, torch.tensor(expected_rows).to(rows.dtype))
        assert got["no_rows"].shape == (0, 4)
        values, splits = got["alltoall"]
        start = rank * (rank + 1) // 2
        assert values.tolist() == [100 * r + start + i for r in range(size) for i in range(rank + 1)]
        assert splits == [rank + 1] * size
        assert all((tensor == size - 1).all() for tensor in [*got["broadcast"], *got["broadcast_tensors"]])
        assert got["broadcast_object"] == {"from": size - 1}
        assert got["objects"] == [["x" * r] for r in range(size)]
        assert [tensor.tolist() for tensor in got["async"]] == [[size * i] * 3 for i in (2.0, 1.0, 0.0)]
        assert_close(got["averaged_mean"], torch.full((2,), (size - 1) / 2))


def test_workers_out_of_step_fail_instead_of_waiting(workers):
    assert all("Mismatched" in saved["comm"]["out_of_step"] for saved in workers)


EXCHANGES = ["plain", "channels_last", "accumulated", "after_backward"]


@pytest.mark.parametrize("case", EXCHANGES)
def test_exchange_gives_the_sum_over_workers(workers, case):
    for saved in workers:
        for sums in saved[case]["sums"]:
            assert set(sums) == set(saved[case]["own"])
            for name, total in sums.items():
                assert_close(total, sum(other[case]["own"][name] for other in workers), rtol=1e-5, atol=1e-3)
    assert workers[0][case]["sums"][0]["0.weight"].abs().max() > 1


@pytest.mark.parametrize("case", EXCHANGES)
def test_exchange_gives_the_same_bits_on_every_worker_and_every_time(workers, case):
    first = workers[0][case]["sums"][0]
    for saved in workers:
        for sums in saved[case]["sums"]:
            assert all(torch.equal(sums[name], first[name]) for name in first)


def test_exchange_overlapped_or_not_gives_the_same_bits(workers):
    first, second = workers[0]["plain"]["sums"][0], workers[0]["after_backward"]["sums"][0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_horovods_threads_give_way_where_nothing_leaves_during_backward(workers):
    for saved in workers:
        during, after = saved["plain"]["nices"], saved["after_backward"]["nices"]
        assert set(during["all"]) == {during["own"]}
        assert LOWEST_NICE in after["all"]
        assert during["own"] == after["own"] < LOWEST_NICE


def test_unused_parameters_get_zeros_and_frozen_ones_nothing(workers):
    sums = workers[0]["plain"]["sums"][0]
    assert (sums["unused"] == 0).all()
    assert "frozen" not in sums


def test_wire_bytes_are_those_of_a_ring(workers):
    size = len(workers)
    num_bytes = 4 * sum(grad.numel() for grad in workers[0]["plain"]["sums"][0].values())
    assert workers[0]["plain"]["num_buckets"] > 1
    assert workers[0]["plain"]["wire_bytes"] == pytest.approx(num_bytes * 2 * (size - 1) / size, abs=4)


def reference_bn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """Outputs, gradient of the images and the model after a pass of plain BatchNorm over the whole global batch."""
    model = program.bn_net()
    images, weights = program.batches()
    images.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        outputs = model(images)
    (outputs.float() * weights).sum().backward()
    return outputs.detach().float(), images.grad, model


@pytest.mark.parametrize("case", ["bn", "bn_channels_last"])
def test_sync_bn_is_batch_norm_over_the_concatenated_batch(workers, case):
    outputs, image_grads, model = reference_bn(torch.float32)
    assert_close(torch.cat([saved[case]["outputs"] for saved in workers]), outputs, rtol=1e-4, atol=2e-4)
    assert_close(torch.cat([saved[case]["image_grads"] for saved in workers]), image_grads, rtol=1e-4, atol=2e-4)
    for name, param in model.named_parameters():
        total = sum(saved[case]["weight_grads"][name] for saved in workers)
        assert_close(total, param.grad, rtol=0, atol=1e-4 * float(param.grad.abs().max()))
    for saved in workers:
        assert set(saved[case]["buffers"]) == {name for name, _ in model.named_buffers()}
        for name, buffer in model.named_buffers():
            assert_close(saved[case]["buffers"][name], buffer, rtol=1e-5, atol=1e-5)


def test_sync_bn_in_bfloat16_is_about_as_close_to_the_truth_as_batch_norm_is(workers):
    truth, plain = reference_bn(torch.float32), reference_bn(torch.bfloat16)
    outputs, image_grads = (torch.cat([saved["bn_bfloat16"][name] for saved in workers]) for name in ("outputs", "image_grads"))
    pairs = [(outputs, plain[0], truth[0]), (image_grads, plain[1], truth[1])]
    for (name, true), other in zip(truth[2].named_parameters(), plain[2].parameters(), strict=True):
        pairs.append((sum(saved["bn_bfloat16"]["weight_grads"][name] for saved in workers), other.grad, true.grad))
    for synchronised, unsynchronised, true in pairs:
        assert (synchronised - true).norm() < 2.5 * (unsynchronised - true).norm()


def test_sync_bn_running_statistics_have_the_same_bits_on_every_worker(workers):
    first = workers[0]["bn"]["buffers"]
    assert all(torch.equal(saved["bn"]["buffers"][name], first[name]) for saved in workers for name in first)


def test_same_bits_when_the_job_is_run_again(job, run_workers):
    first, again = job("horovodrun", 3)[0], run_workers(PROGRAM, 3)[0]
    for name, total in first["channels_last"]["sums"][0].items():
        assert torch.equal(total, again["channels_last"]["sums"][0][name])
    assert torch.equal(first["bn"]["outputs"], again["bn"]["outputs"])
