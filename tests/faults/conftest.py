"""The rig of the fault tests: a lab of three hosts, and an undisturbed run that rows are compared with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "lab")]  # neither is a package: scripts run both without pytest

from matrix import new_rig  # noqa: E402
from netlab import Lab, missing  # noqa: E402
from rig import Rig  # noqa: E402

CONTROL_STEPS = 25


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Three hosts: node1, node2, node3."""
    lack = missing()
    if lack:
        pytest.skip(f"no lab on this machine; it lacks {lack}")
    with Lab.up(3) as lab:
        yield new_rig(lab, tmp_path_factory.mktemp("faults"), CONTROL_STEPS)
