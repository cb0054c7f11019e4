"""``python -m horoyolo.warm`` is what the workers of a host are forked from in an elastic job (``elastic/forkserver.py``).

It has no threads and touches no GPU, since neither would survive a fork.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from contextlib import suppress

from horoyolo import cli
from horoyolo.config import InputError
from horoyolo.elastic.forkserver import COMMAND, FORKS, serve, show_as
from horoyolo.launch.environment import threads_here


def main() -> int:
    """Serves the agent, or, in a fork, is a worker."""
    import_all()
    with socket.socket(fileno=int(os.environ.pop(FORKS))) as control:
        worker = serve(control)
    if worker is None:
        return 0
    words, env = worker
    os.environ.update(env)
    show_as([sys.orig_argv[0], *COMMAND, *words])

    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_here(os.environ, len(os.sched_getaffinity(0))))
    return cli.main(words)


def import_all() -> None:
    """What every worker imports. Numerical libraries start no threads meanwhile."""
    unsaid = "OMP_NUM_THREADS" not in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import horoyolo.engine.start  # noqa: F401
    from horoyolo.distributed.comm import import_horovod
    from horoyolo.report.monitor import import_writers

    import_writers()
    with suppress(InputError):  # whoever needs Horovod says so
        import_horovod(size=2)
    if unsaid:
        del os.environ["OMP_NUM_THREADS"]
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page


if __name__ == "__main__":
    sys.exit(main())
