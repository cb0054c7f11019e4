"""The quick rows of the fault matrix, and how its table judges."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matrix import line, table
from rig import Rig
from rows import ROWS, Result, Row

PATIENCE_S = 60.0
EXACT = {"exact": True, "missing": [], "double": []}
LOST = {"exact": False, "missing": [{"epoch": 0, "first": 16, "stop": 32}], "double": []}


@pytest.mark.parametrize("row", [row for row in ROWS if row.quick], ids=lambda row: row.fault)
def test_row(rig: Rig, row: Row) -> None:
    result = row.check(rig)
    assert not replace(result, limit_s=PATIENCE_S).why_not(), result  # how fast anything is, is not a test's to say


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (Result("all is well", 1.0, 2.5, EXACT, 1e-7), ""),
        (Result("late", 3.0, 2.5, EXACT, 1e-7), "3.0 s"),
        (Result("lost", 1.0, 2.5, LOST, 1e-7), "ledger"),
        (Result("other weights", 1.0, 2.5, EXACT, 1e-3), "losses differ"),
    ],
)
def test_a_row_holds_only_with_time_ledger_and_losses(result: Result, why: str) -> None:
    assert why in result.why_not()
    assert bool(result.why_not()) == bool(why)


def test_rows_have_numbers_of_their_own_and_the_table_a_line_for_each() -> None:
    assert len({row.number for row in ROWS}) == len(ROWS)
    found = {"row": "1", "fault": "f", "expected": "e", "happened": "h", "seconds": 1.0, "account": LOST, "deviation": 0.1, "held": False}
    told = line({**found, "why_not": "lost"}, stock="31 s")
    assert told == "| 1 | f | e | h | 1.00 | 16/0 | no (0.1) | FAILED lost | 31 s |"
    head, rule, row = table([{**found, "why_not": "lost"}], {"1": "31 s"}).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row == told
