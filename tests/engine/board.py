"""Workers as threads of one process, which meet at a board."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from torch import Tensor

from horoyolo.distributed.comm import CommBroken, Handle, LocalComm

TIMEOUT_S = 60.0


class Board:
    """Where the workers of a generation leave what they give to a collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._given: dict[tuple[str, int], dict[int, Any]] = defaultdict(dict)
        self._changed = threading.Condition()

    def exchange(self, key: tuple[str, int], rank: int, value: Any) -> Callable[[], list[Any]]:
        with self._changed:
            self._given[key][rank] = value
            self._changed.notify_all()

        def wait() -> list[Any]:
            with self._changed:
                assert self._changed.wait_for(lambda: len(self._given[key]) == self.size, TIMEOUT_S), key
                return [self._given[key][other] for other in range(self.size)]

        return wait


class Waiting:
    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


class BoardComm(LocalComm):
    """A worker at a board, which may change.

    It does not hear the outcome of collectives whose name begins with ``deaf_to``, from the ``deaf_from``-th of that name on.
    """

    def __init__(self) -> None:
        self.sit_at(Board(1), 0)
        self.deaf_to, self.deaf_from = "nothing", 1

    def sit_at(self, board: Board, rank: int) -> None:
        self._board, self._rank, self._uses = board, rank, defaultdict[str, int](int)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._board.size

    def _begin(self, value: Any, name: str, finish: Callable[[list[Any]], Any]) -> Handle:
        self._uses[name] += 1
        number = self._uses[name]
        wait = self._board.exchange((name, number), self._rank, value)

        def end() -> Any:
            if name.startswith(self.deaf_to) and number >= self.deaf_from:
                raise CommBroken(name)
            return finish(wait())

        return Waiting(end)

    def allreduce_async(self, tensor: Tensor, name: str, op: str = "sum") -> Handle:
        return self._begin(tensor.clone(), name, lambda all_: tensor.copy_(sum(all_) if op == "sum" else torch.stack(all_).amax(0)))

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        return self._begin(tensor.clone(), name, torch.cat)

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> Handle:
        parts = [part.clone() for part in tensor.split(list(splits))]

        def take(all_: list[list[Tensor]]) -> tuple[Tensor, list[int]]:
            mine = [given[self._rank] for given in all_]
            return torch.cat(mine), [len(part) for part in mine]

        return self._begin(parts, name, take)

    def broadcast_async(self, tensor: Tensor, name: str, root: int = 0) -> Handle:
        return self._begin(tensor.clone(), name, lambda all_: tensor.copy_(all_[root]))


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(task) for task in tasks]
        for future in as_completed(futures, TIMEOUT_S):
            future.result()  # who fails tells why, not who waits for him
        return [future.result() for future in futures]
