"""What the processes of a bench say to the one that started them: lines of JSON on standard output, behind a mark, so that others may print too.

Those that no launcher started hear from it as well, on standard input, which gives them an ``allgather`` without any network library.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

MARK = "horoyolo-bench: "
REPORT, GATHER = "report", "gather"


def report(value: Any) -> None:
    """Says what was measured; the last words of a process, of the first worker alone where a launcher started several."""
    _say(REPORT, value)


def heard(line: str) -> tuple[str, Any] | None:
    """REPORT or GATHER and the value, from a line of output (launchers put words of their own before it); None: the line is not for us."""
    _, mark, words = line.partition(MARK)
    return tuple(json.loads(words)) if mark else None


class Starter:
    """The line to who started this process beside others; when it breaks, the process ends: no worker outlives its bench."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.rank, self.hosts = self._told.get()  # which process this is, and the host that each of them is on

    def allgather(self, value: Any) -> list[Any]:
        """What every process gave, in rank order, when all have come here."""
        _say(GATHER, value)
        return self._told.get()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._told.put(json.loads(line))
        os._exit(1)


def _say(kind: str, value: Any) -> None:
    print(f"{MARK}{json.dumps([kind, value])}", flush=True)
