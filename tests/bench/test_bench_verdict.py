"""What follows from a bench's figures: break-even link speeds, and auto against the best fixed entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horoyolo.bench.verdict import auto_against_best, bits_per_s, break_even_bits, verdict_lines


def link(rate: str, **step_s: float) -> dict:
    return {"rate": rate, "rows": {name.replace("_", ", "): {"median_s": time_s} for name, time_s in step_s.items()}}


def links_of(limit_bits: float, rates: list[str]) -> dict:
    """Links on which plain sums move 1e8 bits and an entry half as many, which costs it what the other half takes at ``limit_bits``."""

    def times(rate: str) -> tuple[float, float]:
        bit_s = 0.0 if rate == "0" else 1 / bits_per_s(rate)
        return 1 + 1e8 * bit_s, 1 + 5e7 * bit_s + 5e7 / limit_bits

    return {rate: link(rate, none=times(rate)[0], int8=times(rate)[1]) for rate in rates}


@given(st.floats(60e6, 900e6), st.permutations(["0", "50mbit", "200mbit", "1gbit"]))
def test_the_limit_is_found_between_links(limit_bits: float, rates: list[str]) -> None:
    assert break_even_bits(links_of(limit_bits, rates), "int8") == pytest.approx(limit_bits, rel=1e-6)


def test_without_a_change_of_sign_there_is_no_limit() -> None:
    assert break_even_bits(links_of(10e6, ["50mbit", "0"]), "int8") is None
    assert verdict_lines(links_of(10e6, ["50mbit", "0"]), ["none", "int8"]) == ["int8: gains on none of these links"]


@pytest.mark.parametrize("int8_s", [(1.2, 0.8, 1.2), (0.8, 1.2, 0.8), (0.8, 0.8, 1.2)])
def test_where_it_gains_here_and_there_no_limit_is_told(int8_s: tuple[float, ...]) -> None:
    links = {rate: link(rate, none=1.0, int8=time_s) for rate, time_s in zip(("0", "1gbit", "200mbit"), int8_s, strict=True)}
    assert verdict_lines(links, ["none", "int8"]) == ["int8: gains on some (no clear limit) of these links"]


def test_each_entry_counts_at_its_better_time_to_leave() -> None:
    links = {"0": link("0", none=1.0, int8=1.2), "100mbit": link("100mbit", none=4.0, none_overlapped=3.0, int8=5.0, int8_overlapped=2.8)}
    assert break_even_bits(links, "int8") == pytest.approx(200e6)


@pytest.mark.parametrize(("rate", "bits"), [("50mbit", 5e7), ("1.5Gbit", 1.5e9), ("10kbps", 8e4), ("300bit", 300)])
def test_rates_are_read_as_tc_reads_them(rate: str, bits: float) -> None:
    assert bits_per_s(rate) == pytest.approx(bits)


def test_auto_is_compared_on_other_repeats_than_those_that_chose_the_best() -> None:
    step_s = {"none": [2.0, 1.0, 2.0, 1.0], "int8": [1.5, 3.0, 1.5, 2.0], "auto": [9.0, 3.3, 9.0, 2.2], "DDP, NCHW": [0.1] * 4}
    assert auto_against_best(step_s) == ("int8", pytest.approx(1.1))
    assert auto_against_best({"none": [1.0, 1.0]}) is None
    assert auto_against_best({"none": [1.0], "auto": [1.0]}) is None
