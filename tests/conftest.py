"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, public weights and reference outputs, which lies beside the checkout or where HOROYOLO_SHARED says."""
    folder = Path(os.environ.get("HOROYOLO_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference outputs and real images are not there ({folder}); HOROYOLO_SHARED names their folder")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums in a fixed order, and no test that starts several processes floods the machine."""
    torch.set_num_threads(1)
