"""The sampler's law: whatever the number of workers, and however often it changes, an epoch uses each sample once, in one order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.data.sampler import Sampler, share

few = st.integers(0, 60)
positive = st.integers(1, 20)


@given(count=few, size=positive)
def test_shares_are_contiguous_and_even(count: int, size: int) -> None:
    shares = [share(count, rank, size) for rank in range(size)]
    assert [i for part in shares for i in part] == list(range(count))
    lengths = [len(part) for part in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@settings(deadline=None)
@given(samples=st.integers(1, 60), batch=positive, sizes=st.lists(st.tuples(positive, few), min_size=1, max_size=4), seed=few, epoch=few)
def test_an_epoch_uses_each_sample_once_at_any_sizes(samples: int, batch: int, sizes: list[tuple[int, int]], seed: int, epoch: int) -> None:
    """Each (size, steps): that many workers make that many steps, then a sampler loaded from the state goes on, to the epoch's end."""
    sampler = Sampler(samples, batch, seed)
    sampler.load_state_dict({"epoch": epoch, "consumed": 0})
    used = []
    for size, steps in [*sizes, (sizes[0][0], samples)]:
        workers = [list(sampler.batches(rank, size)) for rank in range(size)]
        assert {len(batches) for batches in workers} == {sampler.global_batches_left()}
        for shares in list(zip(*workers, strict=True))[:steps]:
            keys = [key for keys in shares for key in keys]
            assert len(keys) == min(batch, samples - sampler.consumed)
            sampler.advance(len(keys))
            used += keys
        resumed = Sampler(samples, batch, seed)
        resumed.load_state_dict(sampler.state_dict())
        sampler = resumed
    order = sampler.order(epoch)
    assert [key.index for key in used] == order.tolist()
    assert [key.position for key in used] == list(range(samples))
    assert {key.epoch for key in used} == {epoch}
    assert sampler.global_batches_left() == 0


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    sampler = Sampler(200, 16, seed=0)
    assert sorted(sampler.order(0)) == list(range(200))
    assert np.array_equal(sampler.order(3), Sampler(200, 4, seed=0).order(3))
    assert not np.array_equal(sampler.order(0), sampler.order(1))
    assert not np.array_equal(sampler.order(0), Sampler(200, 16, seed=1).order(0))


def test_batches_asked_for_are_not_moved_by_later_progress() -> None:
    """A loader runs ahead of the loop that counts what was used."""
    sampler = Sampler(10, 4, seed=0)
    batches = sampler.batches(0, 1)
    sampler.advance(4)
    assert [key.position for keys in batches for key in keys] == list(range(10))


def test_next_epoch_starts_afresh() -> None:
    sampler = Sampler(10, 4, seed=0)
    sampler.advance(10)
    sampler.next_epoch()
    assert (sampler.epoch, sampler.consumed) == (1, 0)


def test_more_than_is_left_cannot_be_used() -> None:
    sampler = Sampler(10, 4, seed=0)
    with pytest.raises(ValueError, match="10 of epoch 0 are left"):
        sampler.advance(11)


@pytest.mark.parametrize(("consumed", "content_hash", "told"), [(4, "other", True), (0, "other", False), (4, "same", False)])
def test_within_an_epoch_of_other_samples_it_says_so(consumed: int, content_hash: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    before = Sampler(12, 4, 0, content_hash="same")
    before.advance(consumed)
    Sampler(9, 4, 0, content_hash=content_hash).load_state_dict(before.state_dict())
    assert ("not those of the checkpoint" in caplog.text) == told
