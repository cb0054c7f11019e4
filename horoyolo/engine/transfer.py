"""Nested states of plain values and tensors on their way to other workers, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from horoyolo.distributed.comm import Comm

CHUNK_BYTES = 64 << 20  # sent at a time: large enough for full speed, small beside the state of a large model


class Layout(NamedTuple):
    """What stands for a tensor where its values come later. Memory order counts: fused optimizers read weights and momentum side by side."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """What the values take, without gaps."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def broadcast_state(state: Any, comm: Comm, root: int) -> Any:
    """The ``state`` of worker ``root`` on every worker, its tensors on the CPU; every worker calls it and what the others give is ignored."""
    is_root = comm.rank() == root
    tensors: list[Tensor] = []
    skeleton = comm.broadcast_object(_mapped(state, lambda tensor: _noted(tensor, tensors)) if is_root else None, root)
    layouts: list[Layout] = []
    _mapped(skeleton, layouts.append)
    to_send, received = iter(tensors), []
    for chunk in _chunks(layouts):
        if is_root:
            comm.broadcast(torch.cat([_in_memory_order(tensor) for tensor in islice(to_send, len(chunk))]), root, "state")
            continue
        flat = comm.broadcast(torch.empty(sum(layout.num_bytes for layout in chunk), dtype=torch.uint8), root, "state")
        for part, layout in zip(flat.split([layout.num_bytes for layout in chunk]), chunk, strict=True):
            # Copied, since a tensor must begin at a multiple of its element's size.
            received.append(part.clone().view(layout.dtype).as_strided(layout.shape, layout.stride))
    if is_root:
        return state
    values = iter(received)
    return _mapped(skeleton, lambda _: next(values))


def fingerprint(state: Any) -> str:
    """The same for states with the same values, whatever their memory order and the order of their keys.

    Values of a tensor count by their CRC-32: workers wait for this after each failure, and a SHA-256 of them takes eight times as long.
    """
    digest = hashlib.sha256()
    for path, value in _leaves(state):
        digest.update(path.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(str(zlib.crc32(_in_memory_order(value.detach().contiguous()).numpy().data)).encode())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """``tree`` with each tensor, or each layout of one, replaced by what ``change`` gives for it."""
    if isinstance(tree, (Tensor, Layout)):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _mapped(value, change) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name in sorted(tree, key=str):
            yield from _leaves(tree[name], f"{path}.{name}")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, tree


def _noted(tensor: Tensor, tensors: list[Tensor]) -> Layout:
    """The layout of a tensor whose values, without gaps in memory, go to ``tensors``."""
    tensor = tensor.detach()
    if not (tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))):
        tensor = tensor.contiguous()
    tensors.append(tensor)
    return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The bytes of a tensor without gaps."""
    return tensor.as_strided((tensor.numel(),), (1,)).cpu().view(torch.uint8)


def _chunks(layouts: list[Layout]) -> Iterator[list[Layout]]:
    chunk: list[Layout] = []
    room = CHUNK_BYTES
    for layout in layouts:
        if chunk and layout.num_bytes > room:
            yield chunk
            chunk, room = [], CHUNK_BYTES
        chunk.append(layout)
        room -= layout.num_bytes
    if chunk:
        yield chunk
