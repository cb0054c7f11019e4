"""What the tests of launching share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def equals_file() -> Callable[..., None]:
    """``equals_file(text, path)``: a whole file, of tests/launch/golden unless absolute, must say just that. HOROYOLO_WRITE_GOLDEN=1 writes it."""

    def check(text: str, path: str | Path) -> None:
        file = GOLDEN / path
        if os.environ.get("HOROYOLO_WRITE_GOLDEN"):
            file.write_text(text)
        assert text == file.read_text()

    return check
