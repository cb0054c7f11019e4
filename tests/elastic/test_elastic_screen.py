from __future__ import annotations

import os
import time

from horoyolo.elastic import screen
from horoyolo.elastic.screen import Screen


def test_what_does_not_fit_is_dropped_and_counted(monkeypatch):
    monkeypatch.setattr(screen, "MOST_LINES", 10)
    reader, writer = os.pipe()
    told = Screen(writer)
    begin_s = time.monotonic()
    for number in range(100):
        told.say(f"{number} " + "x" * 20_000)  # a pipe holds 64 kB
    assert time.monotonic() - begin_s < 1
    read = b""
    while b"missing" not in read:
        read += os.read(reader, 2**16)
    lines = read.decode().splitlines()
    numbers = [int(line.split()[0]) for line in lines[:-1]]
    assert numbers == list(range(len(numbers)))  # what there is is whole and in order
    assert 10 <= len(numbers) < 20
    assert lines[-1].startswith(f"horoyolo: {100 - len(numbers)} lines are missing")
    told.say("the end")
    told.close()
    assert os.read(reader, 2**16) == b"the end\n"


def test_nobody_who_reads_is_no_reason_to_wait():
    reader, writer = os.pipe()
    os.close(reader)
    told = Screen(writer)
    told.say("x")
    begin_s = time.monotonic()
    told.close()
    assert time.monotonic() - begin_s < 1
    os.close(writer)
