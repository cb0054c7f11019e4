"""What the loop makes of updates beside training: what it tells of their cost, and what is saved of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from horoyolo.distributed.comm import LocalComm
from horoyolo.engine.build import Training
from horoyolo.engine.stop import StopRequest
from horoyolo.engine.train import averaged, train

Open = Callable[..., Training]


@pytest.mark.parametrize(
    ("batch", "nominal_batch", "comparable"),
    [(3, 0, [True, True, False]), (4, 0, [True, True]), (50, 0, [True]), (3, 6, [True, True, False]), (3, 9, [False, False, True])],
)
def test_what_a_short_last_batch_costs_is_compared_where_all_updates_end_with_it(
    open_job: Open, monkeypatch: pytest.MonkeyPatch, batch: int, nominal_batch: int, comparable: list[bool]
) -> None:
    """Of 8 images. Steps within an update count for nothing."""
    job = open_job(batch=batch, epochs=1, **{"optim.nominal_batch": nominal_batch})
    told: list[bool] = []
    monkeypatch.setattr(job.exchange, "measure", lambda comparable: told.append(comparable))
    train(job, [], StopRequest())
    assert told == comparable


def test_statistics_that_all_workers_share_are_saved_as_they_are(open_job: Open) -> None:
    """A mean of three equal numbers is not always that number."""

    class Three(LocalComm):
        def size(self) -> int:
            return 3

        def allreduce(self, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
            return tensor.add_(tensor).add_(tensor / 2)

    for sync_bn in (True, False):
        job = open_job(**{"comms.sync_bn": sync_bn, "name": str(sync_bn)})
        for buffer in job.model.buffers():
            buffer.copy_(torch.rand_like(buffer, dtype=torch.float32))
        job.comm = Three()
        same = [torch.equal(*pair) for pair in zip(job.model.buffers(), averaged(job.model, job).buffers(), strict=True)]
        assert all(same) == sync_bn
