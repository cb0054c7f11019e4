"""The laws of the contract over every entry of the table on real Horovod workers. Each job is started once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from laws import Round, check_conservation, check_same_bits
from laws_worker import BROKEN, CASES, UPDATES

from horoyolo.compression.build import NAMES


@pytest.fixture(scope="module", params=[2, 3, 4])
def workers(request, run_workers):
    return run_workers(Path(__file__).with_name("laws_worker.py"), request.param)


@pytest.fixture(params=NAMES)
def seen(request, workers):
    """By case and update, for each bucket what every worker saw of it."""
    return {
        case: [
            [[Round(**of_bucket) for of_bucket in of_workers] for of_workers in zip(*of_update, strict=True)]
            for of_update in zip(*(saved[request.param][case] for saved in workers), strict=True)
        ]
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_sums_are_finite_the_same_and_conserve(seen, case):
    for kind, buckets in zip(UPDATES, seen[case], strict=True):
        for rounds in buckets:
            if kind not in BROKEN:
                assert torch.isfinite(rounds[0].result).all()
                check_same_bits(rounds)
                check_conservation(rounds)


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_on_one_worker_shows_on_all_and_changes_no_residual(seen, case):
    for kind, buckets in zip(UPDATES, seen[case], strict=True):
        if kind in BROKEN:
            largest = max(buckets, key=lambda rounds: rounds[0].result.numel())
            assert not any(torch.isfinite(round_.result).all() for round_ in largest)
            assert all(torch.equal(round_.residual_before, round_.residual_after) for rounds in buckets for round_ in rounds)


@pytest.mark.parametrize("case", CASES)
def test_an_update_goes_on_from_the_residuals_of_the_last(seen, case):
    for last, buckets in zip(seen[case], seen[case][1:], strict=False):
        for before, after in zip(last, buckets, strict=True):
            assert all(torch.equal(one.residual_after, other.residual_before) for one, other in zip(before, after, strict=True))
