"""What workers that leave had not sent yet, as one that stays gets it."""

from __future__ import annotations

import pytest
import torch
from board import Board, BoardComm, together

from horoyolo.compression.base import Compressor
from horoyolo.compression.build import build_compressor
from horoyolo.config import Comms
from horoyolo.distributed.comm import CommBroken
from horoyolo.engine.generations import hand_over

LEAVES = (True, False, True, False)  # the second worker is the first that stays
OWN = [{"a": 1.0}, {"a": 10.0, "b": 20.0}, {"b": 100.0, "c": 200.0}, {"a": 1000.0}]


def workers() -> tuple[list[Compressor], list[BoardComm]]:
    compressors, comms, board = [], [], Board(len(LEAVES))
    for rank, own in enumerate(OWN):
        compressors.append(build_compressor(Comms(compression="int8")))
        compressors[-1].load_rank_state_dict({name: torch.full((3,), value) for name, value in own.items()})
        comms.append(BoardComm())
        comms[-1].sit_at(board, rank)
    return compressors, comms


def residuals(compressors: list[Compressor]) -> list[dict[str, float]]:
    return [{name: float(part.mean()) for name, part in compressor.rank_state_dict().items()} for compressor in compressors]


def test_the_first_that_stays_gets_what_those_that_leave_had_not_sent() -> None:
    compressors, comms = workers()
    together([lambda rank=rank: hand_over(compressors[rank], comms[rank], LEAVES[rank]) for rank in range(len(LEAVES))])
    assert residuals(compressors) == [{}, {"a": 11.0, "b": 120.0, "c": 200.0}, {}, {"a": 1000.0}]


@pytest.mark.parametrize(("deaf_to", "deaf_from"), [("allgather_object", 1), ("state", 1), ("state", 2), ("barrier", 1)])
def test_where_the_hand_over_breaks_off_all_keep_what_they_have(deaf_to: str, deaf_from: int) -> None:
    """Nothing is lost, and nothing is there twice when those that would have left meet the others again."""
    compressors, comms = workers()

    def broken(rank: int) -> None:
        comms[rank].deaf_to, comms[rank].deaf_from = deaf_to, deaf_from
        with pytest.raises(CommBroken):
            hand_over(compressors[rank], comms[rank], LEAVES[rank])

    together([lambda rank=rank: broken(rank) for rank in range(len(LEAVES))])
    assert residuals(compressors) == OWN


def test_where_all_leave_nobody_is_sent_anything() -> None:
    compressors, comms = workers()
    together([lambda rank=rank: hand_over(compressors[rank], comms[rank], True) for rank in range(len(LEAVES))])
    assert residuals(compressors) == OWN
