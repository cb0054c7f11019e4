"""Loader processes end with those who started them, and what they meet is told in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FAILING = """
import sys
from horoyolo.data.loader import _build, ending
from torch import zeros
from torch.utils.data import Dataset

class Zeros(Dataset):
    def __getitem__(self, index):
        return zeros(1)

def collate(samples):
    return samples

def fail(loader):
    with ending(loader):
        for batch in loader:
            raise RuntimeError("a failure whose frames hold the loader")

if __name__ == "__main__":
    try:
        fail(_build(Zeros(), [[0], [1]], collate, 2, False))
    except RuntimeError as error:
        sys.kept = error
    print("leaving")
"""


def test_an_exception_that_keeps_a_loader_keeps_no_process_from_its_end(tmp_path: Path) -> None:
    program = tmp_path / "failing.py"
    program.write_text(FAILING)
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "leaving\n"


REFUSING = """
from horoyolo.config import InputError
from horoyolo.data.loader import _build, batches, ending
from torch.utils.data import Dataset

class Refusing(Dataset):
    def __getitem__(self, index):
        try:
            raise ValueError("deeper")
        except ValueError as error:
            raise InputError("pipeline.yaml: it fails: ValueError: deeper") from error

def collate(samples):
    return samples

if __name__ == "__main__":
    for workers in (0, 1):
        loader = _build(Refusing(), [[0]], collate, workers, False)
        with ending(loader):
            try:
                list(batches(loader))
            except InputError as error:
                print(error)
"""


def test_bad_input_that_a_loader_process_meets_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "refusing.py"
    program.write_text(REFUSING)
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "pipeline.yaml: it fails: ValueError: deeper\n" * 2
