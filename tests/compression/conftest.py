"""Workers for the tests of compressors: threads of this process, which hypothesis can shrink, and real Horovod processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from horoyolo.compression import powersgd, small

sys.path.insert(0, str(Path(__file__).parent))  # the laws are also run by Horovod workers, without pytest

from laws import MIN_SAVING, NARROW, SMALL


@pytest.fixture(autouse=True, scope="module")
def _tests_have_large_parameters_too() -> Iterator[None]:
    """Though theirs have hundreds of values, and a dozen of outputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "SMALL", SMALL)
        patch.setattr(powersgd, "NARROW", NARROW)
        patch.setattr(powersgd, "MIN_SAVING", MIN_SAVING)
        yield
