from __future__ import annotations

import pytest
import torch
from torch import nn

from horoyolo.compression.build import COMPRESSORS, build_compressor
from horoyolo.config import Comms, InputError
from horoyolo.distributed.buckets import build_buckets
from horoyolo.distributed.comm import LocalComm


@pytest.mark.parametrize("name", COMPRESSORS)
def test_one_worker_keeps_its_gradients_and_sends_nothing(name):
    (bucket,) = build_buckets(nn.Linear(4, 3).named_parameters(), 1.0)
    bucket.flat.copy_(torch.randn(15))
    before = bucket.flat.clone()
    assert build_compressor(Comms(compression=name)).start(bucket, LocalComm()).finish() == 0
    assert torch.equal(bucket.flat, before)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'zip'.*known are none"):
        build_compressor(Comms(compression="zip"))
