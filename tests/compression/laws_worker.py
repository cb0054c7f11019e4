"""What each Horovod worker of the laws does: the same updates with every entry of the table. It saves what it saw, and the tests judge."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from laws import MIN_SAVING, NARROW, SMALL, buckets_of, take_update, values

from horoyolo.compression import powersgd, small
from horoyolo.compression.build import NAMES, build_compressor
from horoyolo.config import Comms
from horoyolo.distributed.comm import Comm, open_comm

BROKEN = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
ONE_SENDS, ONE_SENDS_NOTHING = "one sends", "one sends nothing"  # the others, or he, have no images
UPDATES = ("zero", "tiny", ONE_SENDS, "normal", "nan", "mixed", "inf", ONE_SENDS_NOTHING, "sparse", "equal", "huge", "-inf", "normal")
CASES: dict[str, dict[str, Any]] = {  # arguments of ``buckets_of``
    "layers": {"shapes": [(24, 30), (40,), (24, 8, 3, 3)], "channels_last": True, "bucket_mb": 0.006},
    "one bucket": {"shapes": [(9, 17, 3, 3), (24, 24), (1,), (700,)]},
    "warm-up": {"shapes": [(24, 30), (24, 8, 3, 3)]},
    "empty and small buckets": {"shapes": [(1100,), (3,), (1100,), (0,)], "bucket_mb": 0.004},
}


def updates(name: str, case: str, comm: Comm) -> list[list[dict[str, Any]]]:
    """What this worker saw of each bucket in each update. A value that is not finite comes from one worker, in the largest bucket."""
    comms = Comms(compression=name, warmup_updates=5 if case == "warm-up" else 0, int8_block=64, onebit_block=64, topk_ratio=0.1, powersgd_rank=2)
    compressor, buckets = build_compressor(comms), buckets_of(**CASES[case])
    largest = max(range(len(buckets)), key=lambda index: buckets[index].flat.numel())
    generator = torch.Generator().manual_seed(comm.rank())
    seen = []
    for index, kind in enumerate(UPDATES):
        own = kind_of(kind, comm.rank() == index % comm.size())
        gradients = [values(own, bucket.flat.numel(), generator) for bucket in buckets]
        if kind in BROKEN and comm.rank() == index % comm.size():
            gradients[largest][70 * index] = BROKEN[kind]
        seen.append([asdict(round_) for round_ in take_update(compressor, buckets, gradients, comm)])
        if kind not in BROKEN:
            compressor.measured(0.2, 0.1, comm)
    return seen


def kind_of(update: str, is_the_one: bool) -> str:
    """The kind of a worker's gradients in an update."""
    if update in (ONE_SENDS, ONE_SENDS_NOTHING):
        return "normal" if is_the_one == (update == ONE_SENDS) else "zero"
    return update


def main(out: Path) -> None:
    torch.set_num_threads(1)
    small.SMALL = SMALL
    powersgd.NARROW, powersgd.MIN_SAVING = NARROW, MIN_SAVING
    comm = open_comm()
    seen = {name: {case: updates(name, case, comm) for case in CASES} for name in NAMES}
    torch.save(seen, out / f"rank{comm.rank()}.pt")
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
