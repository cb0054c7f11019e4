"""How long what has failed is left alone."""

from __future__ import annotations

import math

import pytest

from horoyolo.elastic.rests import FIRST_REST_S, FORGET_S, LONGEST_REST_S, Rests


def test_each_failure_doubles_the_rest_up_to_the_longest() -> None:
    rests, now = Rests[str](), 0.0
    for number in range(12):
        rest_s = rests.fail("node1", now)
        assert rest_s == min(FIRST_REST_S * 2**number, LONGEST_REST_S)
        assert rests.rests("node1", now + rest_s / 2)
        assert not rests.rests("node1", now + rest_s)
        assert rests.failures("node1") == number + 1
        now += rest_s


@pytest.mark.parametrize(("good_s", "failures"), [(FORGET_S - 1, 2), (FORGET_S + 1, 1)])
def test_ten_good_minutes_after_a_rest_are_enough_to_forget(good_s: float, failures: int) -> None:
    rests = Rests[str]()
    rests.fail("node1", rests.fail("node1", now=0.0) + good_s)
    assert rests.failures("node1") == failures


def test_each_key_rests_alone_and_the_next_end_is_the_nearest() -> None:
    rests = Rests[tuple[str, int]]()
    assert rests.next_s(0.0) == math.inf
    assert not rests.rests(("node1", 0), 0.0)
    assert rests.failures(("node1", 0)) == 0
    rests.fail(("node1", 0), now=0.0)
    rests.fail(("node1", 1), now=4.0)
    assert rests.next_s(5.0) == FIRST_REST_S - 5
    assert rests.next_s(FIRST_REST_S) == 4.0
    assert not rests.rests(("node1", 0), FIRST_REST_S)
    assert rests.rests(("node1", 1), FIRST_REST_S)
