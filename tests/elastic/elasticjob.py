"""Elastic jobs on this machine, and what can be seen of them from outside."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STUB = Path(__file__).with_name("stub_worker.py")
LAUNCH = """
import json, os, sys
from pathlib import Path
from horoyolo.elastic.coordinator import Elastic, run_elastic
from horoyolo.elastic.discovery import ask_hostfile, ask_slurm
from horoyolo.elastic.membership import Limits
from horoyolo.launch.job import Job
from horoyolo.launch.run import new_status_dir
from horoyolo.launch.status import STATUS_DIR
argv, env, hostfile, min_np, max_np, hang_timeout_s = json.loads(sys.argv[1])
folder = new_status_dir()
Path(hostfile).with_name("folder").write_text(str(folder))
by_srun = not Path(hostfile).exists()
ask = ask_slurm(os.environ) if by_srun else ask_hostfile(hostfile, None)
elastic = Elastic(Limits(min_np, max_np), ask, 0.2, by_srun, hang_timeout_s)
sys.exit(run_elastic(Job(min_np, argv, {**env, STATUS_DIR: str(folder)}, cwd=os.getcwd()), elastic))
"""


def wait_until(condition: Callable[[], Any], timeout_s: float = 30, what: str = "it did not happen in time") -> None:
    """Wait until a condition holds; fail when it takes longer."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


@dataclass
class ElasticJob:
    """A launcher in a process of its own, its hostfile, and the folder where its workers leave notes."""

    process: subprocess.Popen
    out: Path
    hostfile: Path

    def log(self) -> str:
        """What the launcher and its workers wrote so far."""
        return (self.out / "log.txt").read_text()

    def places(self, generation: int) -> list[dict[str, Any]]:
        """The places that were taken in a generation, by rank; none until all are."""
        found = [json.loads(text) for path in self.out.glob(f"place.{generation}.*") if (text := path.read_text())]
        return sorted(found, key=lambda place: place["rank"]) if found and len(found) == found[0]["size"] else []

    def wait_for(self, generation: int, size: int, timeout_s: float = 30) -> list[dict[str, Any]]:
        """The places of a generation, once all its workers have joined; it must have ``size`` workers."""
        wait_until(lambda: self.places(generation) or self.process.poll() is not None, timeout_s, f"no generation {generation}")
        assert len(self.places(generation)) == size, self.log()
        return self.places(generation)

    def wait(self, timeout_s: float = 30) -> int:
        """The launcher's exit status."""
        return self.process.wait(timeout_s)

    def tag(self) -> bytes:
        """What each process of the job has in its environment."""
        return f"HOROYOLO_STATUS_DIR={(self.out / 'folder').read_text()}".encode()

    def processes(self) -> list[int]:
        """Ids of the job's agents and workers that live."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.tag() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                pass
        return found
