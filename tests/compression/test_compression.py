from __future__ import annotations

import pytest
import torch
from torch import nn

from horoyolo.compression.build import COMPRESSORS, NAMES, build_compressor
from horoyolo.config import Comms, Config, InputError, check_values, override
from horoyolo.distributed.buckets import build_buckets
from horoyolo.distributed.comm import LocalComm


@pytest.mark.parametrize("name", COMPRESSORS)
def test_one_worker_keeps_its_gradients_and_sends_nothing(name):
    (bucket,) = build_buckets(nn.Linear(4, 3).named_parameters(), 1.0)
    bucket.flat.copy_(torch.randn(15))
    before = bucket.flat.clone()
    assert build_compressor(Comms(compression=name)).start(bucket, LocalComm()).finish() == 0
    assert torch.equal(bucket.flat, before)


def test_every_name_can_be_chosen_and_no_other():
    for name in NAMES:
        check_values(override(Config(), {"comms.compression": name}, "test"))
    with pytest.raises(InputError, match="known: " + ", ".join(sorted(NAMES))):
        check_values(override(Config(), {"comms.compression": "zip"}, "test"))
