"""What each codec keeps of its values, and what their shared transport sends."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import KINDS, Round, buckets_of, check_conservation, check_same_bits, take_update, values
from threads import ThreadComm, run_threads
from torch import Tensor

from horoyolo.compression import scatter
from horoyolo.compression.base import ring_bytes
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.compression.quantize import BFloat16, Float16, Int8, OneBit, pack, unpack_signs
from horoyolo.compression.scatter import Codec, Scatter, pieces

CODECS = {"fp16": Float16, "bf16": BFloat16, "int8": Int8, "onebit": OneBit}
LEAST_RATIO = {"fp16": 1.99, "bf16": 1.999, "int8": 3.9, "onebit": 28.0}  # fp32 bytes to those sent
YOLOV5S_BUCKET = 6_213_000  # values: what of its 7.2 million fits into 25 MB, about
DEFAULT_BLOCKS = {"fp16": {}, "bf16": {}, "int8": {"block": 1024}, "onebit": {"block": 64}}
FLOAT32_MAX = torch.finfo(torch.float32).max


def default(name: str) -> Codec:
    return CODECS[name](**DEFAULT_BLOCKS[name])


@dataclass(frozen=True)
class Trip:
    """Values there and back again."""

    decoded: Tensor
    lost: Tensor


def round_trip(codec: Codec, flat: Tensor, seed: int = 0) -> Trip:
    """Encodes and decodes, in the pieces that the transport takes."""
    rows = torch.zeros(-(-flat.numel() // codec.block), codec.row_bytes, dtype=torch.uint8)
    decoded, lost = torch.empty_like(flat), torch.full_like(flat, 7.0)
    draws = random.Random(seed)
    for (given_, missed), columns in pieces(codec, (flat, lost), rows):
        codec.encode(given_, missed, columns, draws)
    for (got,), columns in pieces(codec, (decoded,), rows.clone()):
        codec.decode(columns, got)
    return Trip(decoded, lost)


def block_largest(codec: Codec, flat: Tensor) -> Tensor:
    """For each value the largest magnitude of its block."""
    return torch.cat([part.abs().amax().expand(len(part)) for part in flat.split(codec.block)])


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "CPU_PIECE", 200)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(numel=st.integers(0, 700), block=st.integers(1, 150), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_what_is_lost_is_what_decoding_misses(name, numel, block, kind, seed):
    flat = values(kind, numel, torch.Generator().manual_seed(seed))
    trip = round_trip(CODECS[name](block=block), flat, seed)
    assert torch.isfinite(trip.decoded).all()
    gap = (flat.double() - trip.decoded.double() - trip.lost.double()).abs()
    assert (gap <= 1.2e-7 * (flat.abs() + trip.decoded.abs()) + 1e-44).all()  # one rounding


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    numel=st.integers(1, 500),
    block=st.integers(1, 150),
    where=st.integers(0, 499),
)
def test_a_block_that_is_not_finite_decodes_to_one_and_others_are_spared(name, bad, numel, block, where):
    codec = CODECS[name](block=block)
    flat = torch.linspace(-1, 1, numel)
    flat[where % numel] = bad
    finite = [bool(torch.isfinite(part).all()) for part in round_trip(codec, flat).decoded.split(block)]
    assert [index for index, good in enumerate(finite) if not good] == [where % numel // block]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("extreme", [0.0, 1e-45, -1e-38, 2 - 2.0**-23, 1e38, 0.999 * FLOAT32_MAX, -0.999 * FLOAT32_MAX])
def test_extreme_values_come_back_finite(name, extreme):
    trip = round_trip(CODECS[name](block=64), torch.full((130,), extreme))
    assert torch.isfinite(trip.decoded).all()
    error = 1 / 2 if name == "onebit" else 1 / 100  # one has powers of two alone, of which the largest is half the largest number
    assert torch.allclose(trip.decoded, torch.full((130,), extreme), rtol=error, atol=1.2e-38)


def test_bf16_clamps_what_would_round_to_infinity():
    trip = round_trip(BFloat16(64), torch.full((3,), FLOAT32_MAX))
    assert torch.equal(trip.decoded, torch.full((3,), torch.finfo(torch.bfloat16).max))
    assert torch.equal(trip.lost, FLOAT32_MAX - trip.decoded)


@pytest.mark.parametrize(("name", "bits"), [("fp16", 11), ("bf16", 8)])
def test_floats_are_right_to_their_bits(name, bits):
    flat = values("mixed", 50_000, torch.Generator().manual_seed(0))
    codec = default(name)
    error = (round_trip(codec, flat).decoded - flat).abs()
    smallest = block_largest(codec, flat) * 2.0**-38 if name == "fp16" else 0.0  # below its normal numbers steps are equal
    assert (error <= 2.0**-bits * flat.abs() + smallest).all()


def test_int8_is_off_by_less_than_a_step_and_right_in_the_mean():
    flat = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 1e-3
    codec = Int8(1024)
    steps = block_largest(codec, flat) / 127
    errors = torch.stack([(round_trip(codec, flat, seed).decoded - flat) / steps for seed in range(400)])
    assert errors.abs().max() < 1.0001
    assert errors.abs().max() > 0.9  # rounding is random, not to nearest
    of_each = errors.mean(0)  # a standard deviation of at most 0.5 / sqrt(400)
    assert of_each.abs().max() < 0.025 * 5
    assert abs(float(errors.mean())) < 0.002


def test_int8_draws_other_numbers_in_other_updates_and_on_other_ranks():
    flat = torch.randn(2048, generator=torch.Generator().manual_seed(2))
    assert torch.equal(round_trip(Int8(64), flat, 1).decoded, round_trip(Int8(64), flat, 1).decoded)
    assert not torch.equal(round_trip(Int8(64), flat, 1).decoded, round_trip(Int8(64), flat, 2).decoded)


def test_onebit_keeps_signs_and_magnitudes_of_each_block_as_a_power_of_two():
    flat = torch.randn(10_000, generator=torch.Generator().manual_seed(3)) * torch.logspace(-30, 30, 10_000)
    decoded = round_trip(OneBit(64), flat).decoded
    assert torch.equal(decoded.sign(), flat.sign())
    for before, after in zip(flat.split(64), decoded.split(64), strict=True):
        (power,) = after.abs().unique().tolist()
        assert math.frexp(power)[0] == 0.5
        assert 2 / 3 - 1e-6 <= power / float(before.abs().mean()) <= 4 / 3 + 1e-6


@settings(max_examples=30, deadline=None, derandomize=True)
@given(blocks=st.integers(1, 5), octets=st.integers(1, 40), seed=st.integers(0, 99))
def test_bits_are_packed_lowest_first_and_come_back_as_signs(blocks, octets, seed):
    bits = torch.rand(blocks, 8 * octets, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(bits)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])
    assert torch.equal(packed.long(), (bits.view(blocks, octets, 8) * weights).sum(-1))
    assert torch.equal(unpack_signs(packed), torch.where(bits, -1, 1).to(torch.int8))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(numel=st.integers(0, 3000), block=st.integers(1, 300), at_once=st.integers(1, 1000))
def test_pieces_are_whole_blocks_that_cover_everything_once(numel, block, at_once):
    codec = BFloat16(block)
    flat = torch.arange(numel, dtype=torch.float32)
    rows = torch.zeros(-(-numel // block), codec.row_bytes, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "CPU_PIECE", at_once)
        seen = [(view.clone(), column) for (view,), (column,) in pieces(codec, (flat,), rows)]
    assert torch.equal(torch.cat([flat[:0], *(view.flatten() for view, _ in seen)]), flat)
    assert sum(len(column) for _, column in seen) == len(rows)
    assert all(view.shape[1] == block for view, _ in seen[:-1])
    assert all(len(view) == len(column) and view.numel() <= max(at_once, block) for view, column in seen)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=st.integers(2, 5), numel=st.integers(0, 900), block=st.integers(1, 90), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_parts_of_any_length_sum_conserve_and_agree(name, size, numel, block, kind, seed):
    def work(comm: ThreadComm) -> list[list[Round]]:
        compressor = ErrorFeedback(Scatter(CODECS[name](block=block)))
        buckets = buckets_of([(numel,)])
        generator = torch.Generator().manual_seed(100 * seed + comm.rank())
        return [take_update(compressor, buckets, [values(kind, numel, generator)], comm) for _ in range(2)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "CPU_PIECE", 100)
        seen = run_threads(size, work)
    for update in range(2):
        rounds = [of_worker[update][0] for of_worker in seen]
        check_same_bits(rounds)
        check_conservation(rounds)


class Wire:
    """One of ``size`` workers with nobody at the other end: notes what it sends, and gets zeros."""

    def __init__(self, size: int):
        self._size = size
        self.sent_bytes = 0

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size

    def alltoall_async(self, tensor: Tensor, splits: list[int], name: str) -> Now:
        assert tensor.dtype == torch.uint8
        self.sent_bytes += sum(splits[1:]) * tensor.shape[1]
        return Now(lambda: (torch.zeros_like(tensor), splits))

    def allgather_async(self, tensor: Tensor, name: str) -> Now:
        self.sent_bytes += (self._size - 1) * tensor.numel()
        return Now(lambda: tensor.repeat(self._size, 1))


@dataclass(frozen=True)
class Now:
    wait: Callable[[], object]


def bytes_sent(codec: Codec, numel: int, size: int) -> int:
    """By one worker in an update of a bucket; what is declared is what goes out."""
    (bucket,) = buckets_of([(numel,)], bucket_mb=1e3)
    wire = Wire(size)
    pending = Scatter(codec).start(bucket, wire, torch.empty(numel))
    pending.proceed()
    assert pending.finish() == wire.sent_bytes
    return wire.sent_bytes


@pytest.mark.parametrize("name", CODECS)
def test_bytes_of_a_bucket_of_yolov5s(name):
    for size in (2, 3):
        assert ring_bytes(4 * YOLOV5S_BUCKET, size) / bytes_sent(default(name), YOLOV5S_BUCKET, size) >= LEAST_RATIO[name]


@pytest.mark.parametrize("name", CODECS)
def test_bytes_do_not_grow_with_the_number_of_workers(name):
    codec = default(name)
    encoded = 512 * codec.row_bytes
    for size in (2, 4, 8, 16):
        assert bytes_sent(codec, 512 * codec.block, size) == 2 * (size - 1) * encoded // size


def test_calls_of_the_codec_hardly_grow_with_the_number_of_workers():
    """Each takes time of its own, however few its values."""

    class Counting(Int8):
        def encode(self, *args):
            calls.append("encode")
            super().encode(*args)

        def decode(self, *args):
            calls.append("decode")
            super().decode(*args)

    def calls_among(size: int) -> int:
        calls.clear()
        bytes_sent(Counting(1024), 1 << 22, size)
        return len(calls)

    calls: list[str] = []
    assert calls_among(64) <= 2 * calls_among(8)
