"""Fixtures of the lab: several hosts on this machine, and a real Slurm on them. Where it can't be made, the tests that ask for it are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the lab is no package: scripts/lab.sh runs it without pytest and without horoyolo

import slurmlab
from netlab import Lab, missing
from slurmlab import Slurm
from training import ENV, HOROYOLO, TIMEOUT_S, steps, train_words

from horoyolo.data.synthetic import write_synthetic


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


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 images to train on: batches of 16, 16 and 3, so that hosts get different shares."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(folder, 43, seed=0)
    return folder / "data.yaml"


@pytest.fixture(scope="session")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The steps of the small training by a single process on this machine."""
    project = tmp_path_factory.mktemp("alone")
    argv = [*HOROYOLO, *train_words(dataset, project)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env={**os.environ, **ENV})
    assert done.returncode == 0, done.stderr[-3000:]
    return steps(project / "run")
