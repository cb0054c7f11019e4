from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.distributed.comm import Done, LocalComm
from horoyolo.engine import transfer
from horoyolo.engine.transfer import broadcast_state, fingerprint

SHAPES = st.lists(st.integers(0, 5), max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16])
PLAIN = st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.none(), st.booleans())


@st.composite
def a_tensor(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(SHAPES)
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(draw(DTYPES))
    order = draw(st.sampled_from(["plain", "transposed", "channels_last", "strided"]))
    if order == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, 1)
    if order == "channels_last" and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    return tensor.repeat(2, *[1] * (tensor.ndim - 1))[::2] if order == "strided" and tensor.ndim else tensor


STATES = st.recursive(
    st.one_of(PLAIN, a_tensor()), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12
)


class Wire(LocalComm):
    """One of two workers: the root notes what it broadcasts, the other receives that."""

    def __init__(self, sent: list[torch.Tensor], rank: int) -> None:
        self._sent, self._rank = sent, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2

    def broadcast_async(self, tensor: torch.Tensor, name: str, root: int = 0) -> Done:
        if self._rank == root:
            self._sent.append(tensor.clone())
            return Done(tensor)
        value = self._sent.pop(0)
        assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
        return Done(tensor.copy_(value))


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    return left == right


@settings(max_examples=100, deadline=None)
@given(state=STATES, chunk_bytes=st.sampled_from([1, 16, 1 << 20]))
def test_a_state_arrives_as_it_was_sent(state: object, chunk_bytes: int) -> None:
    sent: list[torch.Tensor] = []
    before, transfer.CHUNK_BYTES = transfer.CHUNK_BYTES, chunk_bytes
    try:
        assert broadcast_state(state, Wire(sent, rank=0), root=0) is state
        received = broadcast_state(None, Wire(sent, rank=1), root=0)
    finally:
        transfer.CHUNK_BYTES = before
    assert not sent
    assert same(state, received)
    assert fingerprint(state) == fingerprint(received)


def test_memory_order_is_kept_and_does_not_show_in_the_fingerprint() -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    sent: list[torch.Tensor] = []
    broadcast_state({"w": weight}, Wire(sent, rank=0), root=0)
    received = broadcast_state(None, Wire(sent, rank=1), root=0)["w"]
    assert received.stride() == weight.stride()
    assert fingerprint({"w": weight}) == fingerprint({"w": weight.contiguous()})


def test_a_fingerprint_shows_every_change() -> None:
    state = {"a": [torch.zeros(3), 1], "b": {"c": 2.0}}
    changes = [{"a": [torch.tensor([0, 0, 1e-45]), 1]}, {"a": [torch.zeros(3), 2]}, {"b": {"c": 2.5}}, {"b": {"d": 2.0}}]
    assert len({fingerprint(state | change) for change in [{}, *changes]}) == 5
    assert fingerprint(dict(reversed(state.items()))) == fingerprint(state)
