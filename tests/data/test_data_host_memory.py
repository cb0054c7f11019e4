"""Memory: of the machine, and what a control group leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from horoyolo.data.host_memory import memory_bytes

V2 = {"memory.max": "1000000", "memory.current": "900000", "memory.stat": "anon 200000\ninactive_file 600000\n"}
V1 = {"memory/memory.limit_in_bytes": "1000000", "memory/memory.usage_in_bytes": "900000", "memory/memory.stat": "total_inactive_file 600000\n"}


@pytest.mark.parametrize("files", [V2, V1])
def test_files_that_were_read_do_not_count_as_used(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory_bytes(tmp_path) == (700000, 1000000)


@pytest.mark.parametrize("files", [{}, V2 | {"memory.max": "max\n"}])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    free, total = memory_bytes(tmp_path)
    assert 1_000_000 < free <= total
