"""Imports go down only: the floors of the package, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "horoyolo"

FLOORS = {
    "config": 1,
    "files": 1,
    "flag_types": 1,
    "signals": 1,
    "data": 2,
    "model": 2,
    "compression": 2,
    "distributed": 2,
    "launch": 2,
    "report": 2,
    "elastic": 3,
    "engine": 4,
    "predict": 5,
    "val": 5,
    "export": 5,
    "tune": 5,
    "stats": 5,
    "bench": 5,
    "flags": 5,
    "cli": 6,
    "__main__": 7,
    "warm": 7,
}
ALSO_FORBIDDEN = {("engine", "launch")}
ONLY_IN = {
    "horovod": {"distributed/comm.py", "elastic/state.py"},
    "mpi4py": {"distributed/pipeline.py", "launch/doctor.py"},
}
WITHOUT_TORCH = ("config.py", "files.py", "flag_types.py", "flags.py", "signals.py", "cli.py", "launch/*.py", "data/spec.py")

MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(module: Path) -> Iterator[tuple[str, bool]]:
    """Each imported name, and whether it is imported at the top of the module."""
    tree = ast.parse(module.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            if node.module == "horoyolo":
                yield from ((f"horoyolo.{alias.name}", id(node) in top) for alias in node.names)
            else:
                yield node.module or "", id(node) in top


def room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(module: Path) -> None:
    here = room(module)
    if here == "__init__":
        assert not [name for name, _ in imported(module) if name.startswith("horoyolo")]
        return
    for name, _ in imported(module):
        if not name.startswith("horoyolo."):
            continue
        there = name.split(".")[1]
        if there in ("__version__", here):
            continue
        assert FLOORS[there] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"
        assert (here, there) not in ALSO_FORBIDDEN, f"{here} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_horovod_and_mpi_stay_in_their_rooms(module: Path) -> None:
    for name, at_top in imported(module):
        package = name.split(".")[0]
        if package in ONLY_IN:
            assert str(module.relative_to(PACKAGE)) in ONLY_IN[package], f"imports {name}"
            assert not at_top, f"{name} is imported at the top: importing the package would need it"


@pytest.mark.parametrize("pattern", WITHOUT_TORCH)
def test_launching_needs_no_torch(pattern: str) -> None:
    for module in PACKAGE.glob(pattern):
        assert not [name for name, at_top in imported(module) if at_top and name.split(".")[0] == "torch"], module


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} - {"__init__"} <= FLOORS.keys()
