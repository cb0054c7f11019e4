"""Workers for the tests of compressors: threads of this process, which hypothesis can shrink, and real Horovod processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from horoyolo.compression import small

sys.path.insert(0, str(Path(__file__).parent))  # the laws are also run by Horovod workers, without pytest

from laws import SMALL


@pytest.fixture(autouse=True, scope="module")
def _tests_have_large_parameters_too() -> Iterator[None]:
    """Though theirs have hundreds of values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "SMALL", SMALL)
        yield
