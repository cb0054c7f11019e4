"""One process of ``bench allreduce``: sums as training does when a launcher has started it, over plain sockets with ``--sockets``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from horoyolo.bench.sweep import sweep
from horoyolo.bench.talk import Starter, report


def main() -> None:
    """Parses the words that ``bench allreduce`` gives its processes, and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parser.add_argument("--sockets", action="store_true")
    parsed = parser.parse_args()
    if parsed.sockets:
        sum_by_sockets(parsed.sizes)
    else:
        sum_by_comm(parsed.sizes)


def sum_by_comm(sizes: list[int]) -> None:
    """Measures ``Comm.allreduce`` with Horovod set up as for training."""
    import torch

    from horoyolo.config import Config
    from horoyolo.distributed.comm import open_comm
    from horoyolo.engine.device import cycle_time_ms

    torch.set_num_threads(1)
    comm = open_comm(cycle_time_ms(Config(device="cpu")))

    def prepare(numel: int) -> Callable[[], object]:
        values = torch.zeros(numel).fill_(0.0)  # memory that is there before the clock runs
        return lambda: comm.allreduce(values, name=f"bench.{numel}")

    medians = sweep(sizes, prepare)
    if comm.rank() == 0:
        report(medians)
    comm.barrier()
    comm.close()


def sum_by_sockets(sizes: list[int]) -> None:
    """Measures the socket ring; started beside others, without a launcher."""
    import numpy as np

    from horoyolo.bench.ring import SocketRing

    ring = SocketRing(Starter())

    def prepare(numel: int) -> Callable[[], object]:
        values = np.zeros(numel, np.float32)
        values.fill(0.0)
        return lambda: ring.allreduce(values)

    report(sweep(sizes, prepare))


if __name__ == "__main__":
    main()
