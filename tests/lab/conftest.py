"""Fixtures of the lab: several hosts on this machine, and a real Slurm on them. Where it can't be made, the tests that ask for it are skipped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the lab is no package: scripts/lab.sh runs it without pytest and without horoyolo

import slurmlab
from netlab import Lab, missing
from slurmlab import Slurm


@pytest.fixture(scope="session")
def _lab_possible() -> None:
    lack = missing()
    if lack:
        pytest.skip(f"no lab on this machine; it lacks {lack}")


@pytest.fixture
def make_lab(_lab_possible: None) -> Iterator[Callable[[int], Lab]]:
    """``make_lab(3)`` gives a lab of three hosts; all are torn down after the test."""
    made: list[Lab] = []

    def make(num_hosts: int) -> Lab:
        made.append(Lab.up(num_hosts))
        return made[-1]

    yield make
    for lab in made:
        lab.down()


@pytest.fixture
def lab(make_lab: Callable[[int], Lab]) -> Lab:
    """Three hosts, fresh for each test: node1, node2, node3."""
    return make_lab(3)


@pytest.fixture
def slurm(make_lab: Callable[[int], Lab]) -> Slurm:
    """A fresh Slurm on two hosts, node1 and node2; ``slurm.lab`` is their lab."""
    lack = slurmlab.missing()
    if lack:
        pytest.skip(f"no Slurm on this machine; it lacks {lack}")
    slurm = Slurm(make_lab(2))
    slurm.up()
    return slurm
