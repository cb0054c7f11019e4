"""A worker that ends as its argument says. It never imports torch or Horovod, so that tests of the launcher are quick."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from horoyolo.launch.status import announce_worker, report_status
from horoyolo.signals import leave_lost_terminal


def main(plan: str, out: Path) -> int:
    rank = int(os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    (out / f"started.{rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    if plan == "fail":  # the last worker meets bad input, the others work on
        if rank == int(os.environ.get("HOROVOD_SIZE", "1")) - 1:
            return report_status(2)
    elif plan == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif plan == "stop":  # stops on request, after last steps that take their time
        stop = []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: stop.append(time.monotonic()))
        announce_worker()
        (out / f"ready.{rank}").touch()
        while not stop:
            time.sleep(0.02)
        leave_lost_terminal()
        print("stopping", "." * (1 << 18), flush=True)  # more than a pipe holds
        time.sleep(0.5 * rank)
        (out / f"stopped.{rank}").touch()
        return report_status(75)
    elif plan == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        announce_worker()
        (out / f"ready.{rank}").touch()
    elif plan == "done":
        return report_status(0)
    time.sleep(60)
    return report_status(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
