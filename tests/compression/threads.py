"""Several workers as threads of one process: the collectives that compressors use, over a board in memory. It counts the bytes that each sends."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
TIMEOUT_S = 20.0


class Board:
    """Where workers leave what they give to a collective, under its name and how often that name was used."""

    def __init__(self, size: int):
        self.size = size
        self._given: dict[tuple[str, int], dict[int, Any]] = defaultdict(dict)
        self._changed = threading.Condition()

    def give(self, key: tuple[str, int], rank: int, value: Any) -> None:
        with self._changed:
            self._given[key][rank] = value
            self._changed.notify_all()

    def all_of(self, key: tuple[str, int]) -> list[Any]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._given[key]) == self.size, TIMEOUT_S):
                raise TimeoutError(f"{key}: only ranks {sorted(self._given[key])} of {self.size} came")
            return [self._given[key][rank] for rank in range(self.size)]


class ThreadComm:
    """One of the workers of a board. ``sent_bytes`` grows as on a ring, or with what goes to others."""

    def __init__(self, board: Board, rank: int):
        self._board, self._rank = board, rank
        self._uses: dict[str, int] = defaultdict(int)
        self.sent_bytes = 0
        self.is_starved = False

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._board.size

    def gave_way_for_good(self) -> bool:
        return self.is_starved

    def allreduce_async(self, tensor: Tensor, name: str, op: Literal["sum", "max"] = "sum") -> _Handle:
        assert tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64), "what Horovod reduces"
        self.sent_bytes += 2 * (self.size() - 1) * tensor.numel() * tensor.element_size() // self.size()

        def reduce(tensors: list[Tensor]) -> Tensor:
            stacked = torch.stack(tensors)
            return tensor.copy_(stacked.sum(0) if op == "sum" else stacked.amax(0))

        return self._exchange(tensor.clone(), name, reduce)

    def allgather_async(self, tensor: Tensor, name: str) -> _Handle:
        def gather(tensors: list[Tensor]) -> Tensor:
            sizes = [part.numel() * part.element_size() for part in tensors]
            self.sent_bytes += sum(sizes) - sizes[(self._rank + 1) % len(sizes)]
            return torch.cat(tensors)

        return self._exchange(tensor.clone(), name, gather)

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> _Handle:
        assert sum(splits) == len(tensor), "every row goes somewhere"
        assert len(splits) == self.size()
        parts = [part.clone() for part in tensor.split(list(splits))]
        self.sent_bytes += sum(part.numel() * part.element_size() for rank, part in enumerate(parts) if rank != self._rank)

        def take(given: list[list[Tensor]]) -> tuple[Tensor, list[int]]:
            mine = [of_rank[self._rank] for of_rank in given]
            return torch.cat(mine), [len(part) for part in mine]

        return self._exchange(parts, name, take)

    def _exchange(self, value: Any, name: str, finish: Callable[[list[Any]], Any]) -> _Handle:
        key = (name, self._uses[name])
        self._uses[name] += 1
        self._board.give(key, self._rank, value)
        return _Handle(lambda: finish(self._board.all_of(key)))


class _Handle:
    def __init__(self, wait: Callable[[], Any]):
        self.wait = wait


def run_threads(size: int, work: Callable[[ThreadComm], T]) -> list[T]:
    """What ``work`` gives on each of ``size`` workers, in rank order."""
    board = Board(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [ThreadComm(board, rank) for rank in range(size)]))
