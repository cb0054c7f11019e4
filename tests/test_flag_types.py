"""What can't be a figure, or can't hold what is to be written, is told before any work is done."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from horoyolo.flag_types import above_zero, file_or_dash, file_to_write, folder_to_write, fraction, not_negative, positive, positives


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive, {"1": 1, "20": 20}, ["0", "-3"]),
        (not_negative, {"0": 0, "7": 7}, ["-1"]),
        (above_zero, {"0.5": 0.5, "4": 4.0}, ["0", "-1", "nan", "inf"]),
        (fraction, {"0": 0.0, "1": 1.0}, ["1.1", "-0.1", "nan"]),
        (positives, {"320": [320], "8,16": [8, 16]}, ["0", "8,", "x", "8,-1"]),
    ],
)
def test_numbers(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(ArgumentTypeError, match="wanted"):
            kind(text)


def test_a_file_or_a_folder_that_is_not_there_yet_can_be_made(tmp_path: Path):
    assert file_to_write(f"{tmp_path}/a/b/c.json") == f"{tmp_path}/a/b/c.json"
    assert folder_to_write(f"{tmp_path}/a/b") == tmp_path / "a" / "b"
    assert file_or_dash("-") == "-"
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentTypeError, match="is a folder; the name of a file is wanted"):
        file_or_dash(str(tmp_path))
    for text, kind in ((f"{tmp_path}/file/x.json", file_to_write), (f"{tmp_path}/file", folder_to_write), (f"{tmp_path}/file/a/b", folder_to_write)):
        with pytest.raises(ArgumentTypeError, match=f"{tmp_path}/file is a file; a folder is wanted there"):
            kind(text)
