"""The peer of ``horoyolo bench allreduce``: Horovod's own ``allreduce`` with its own defaults.

    horovodrun -np 2 --gloo python scripts/peers/stock_allreduce.py --sizes 4 1048576

The first worker reports the median time for each size in bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import horovod.torch as hvd
import torch

from horoyolo.bench.sweep import sweep
from horoyolo.bench.talk import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parsed = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)

    def prepare(numel: int) -> Callable[[], object]:
        values = torch.zeros(numel).fill_(0.0)
        return lambda: hvd.allreduce_(values, op=hvd.Sum, name=f"bench.{numel}")

    medians = sweep(parsed.sizes, prepare)
    if hvd.rank() == 0:
        report(medians)
    hvd.shutdown()


if __name__ == "__main__":
    main()
