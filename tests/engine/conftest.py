"""Small runs for the tests of the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # small runs are also made by Horovod workers, without pytest

from small_run import build_job

from horoyolo.data.synthetic import write_synthetic
from horoyolo.distributed.comm import LocalComm
from horoyolo.engine.build import Training


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data.yaml of 8 images to train on and 2 to evaluate."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    write_synthetic(folder, 10, seed=0)
    return folder / "data.yaml"


@pytest.fixture
def open_job(tiny: Path, tmp_path: Path) -> Callable[..., Training]:
    """``open_job(key=value, ...)``: one worker's run over ``tiny``, 4 steps of 2 images an epoch, each an update; resumed where it was begun."""
    return lambda **values: build_job(tiny, tmp_path, LocalComm(), **values)
