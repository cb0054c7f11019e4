"""What ``bench elastic`` runs on each host: it finds the workers of a job there and kills them as a failure would.

``python -m horoyolo.bench.hand FOLDER`` reads requests as lines of JSON on its input and answers each with a line: ``["workers", WORDS]`` gives the
process ids of those that were started with these words, ``["kill", PID]`` sends SIGKILL. When its input ends it kills every process that has
``FOLDER`` as its status folder: launchers of others leave theirs behind on other hosts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horoyolo.launch.agent import kill_job


def main(folder: Path) -> None:
    """Serves until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever asks decides when it ends
    try:
        for line in sys.stdin:
            print(json.dumps(answer(*json.loads(line))), flush=True)
    finally:
        kill_job(folder)


def answer(what: str, value: Any) -> Any:
    """Does what a request says."""
    if what == "workers":
        return workers(value)
    os.kill(value, signal.SIGKILL)
    return "killed"


def workers(words: Sequence[str]) -> list[int]:
    """Processes of this host that run Python with these words, oldest first; options of Python before them do not count."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            said = Path(f"/proc/{name}/cmdline").read_bytes().decode().split("\0")[:-1]
            parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if [word for word in said if word != "-u"] == list(words):
            found.append((int(name), int(parent)))
    ids = {pid for pid, _ in found}
    return sorted(pid for pid, parent in found if parent not in ids)  # not what a worker has forked


if __name__ == "__main__":
    main(Path(sys.argv[1]))
