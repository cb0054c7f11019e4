from __future__ import annotations

import pytest
import torch
from torch import nn

from horoyolo.compression.build import COMPRESSORS, NAMES, build_compressor, describe_compression
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


@pytest.mark.parametrize("name", COMPRESSORS)
def test_an_entry_names_the_settings_it_is_made_from(name):
    class Noting:
        def __init__(self):
            self.read = set()

        def __getattr__(self, setting):
            self.read.add(setting)
            return getattr(Comms(), setting)

    noting = Noting()
    COMPRESSORS[name].make(noting)
    assert noting.read == set(COMPRESSORS[name].settings)


def test_what_a_compression_is_called_tells_what_matters_to_it_alone():
    assert describe_compression(Comms(compression="powersgd", powersgd_rank=2)) == "powersgd, powersgd_rank=2, warmup_updates=10"
    assert describe_compression(Comms(topk_ratio=0.1)) == "none"
    assert "topk_ratio=0.1" in describe_compression(Comms(compression="auto", topk_ratio=0.1))


def test_every_name_can_be_chosen_and_no_other():
    for name in NAMES:
        check_values(override(Config(), {"comms.compression": name}, "test"))
    with pytest.raises(InputError, match="known: " + ", ".join(sorted(NAMES))):
        check_values(override(Config(), {"comms.compression": "zip"}, "test"))
