"""What a word of the command line must be: types for argparse. All raise argparse.ArgumentTypeError, which names the flag."""

from __future__ import annotations

import math
import os
from argparse import ArgumentTypeError
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1 up."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{text}: at least 1 is wanted")
    return number


def not_negative(text: str) -> int:
    """A whole number from 0 up."""
    number = int(text)
    if number < 0:
        raise ArgumentTypeError(f"{text}: at least 0 is wanted")
    return number


def above_zero(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text}: a number above 0 is wanted")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"{text}: a number from 0 to 1 is wanted")
    return number


def positives(text: str) -> list[int]:
    """Whole numbers from 1 up between commas."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ArgumentTypeError(f"{text}: numbers from 1 up are wanted, such as 320,480,640")
    return numbers


def file_to_write(text: str) -> str:
    """The name of a file that can be written, its folder made; known before the work whose outcome it is to hold."""
    if Path(text).is_dir():
        raise ArgumentTypeError(f"{text} is a folder; the name of a file is wanted")
    folder_to_write(str(Path(text).absolute().parent))
    return text


def file_or_dash(text: str) -> str:
    """As ``file_to_write``, or ``-``."""
    return text if text == "-" else file_to_write(text)


def folder_to_write(text: str) -> Path:
    """A folder that is there or can be made, and written to."""
    path = Path(text).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise ArgumentTypeError(f"{there} is a file; a folder is wanted there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"{there} can't be written to")
    return Path(text)
