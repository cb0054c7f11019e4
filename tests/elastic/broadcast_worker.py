"""One of two workers: rank 0 sends the other more bytes than go through at once, or nothing (``idle``). Its channel leads to a test."""

from __future__ import annotations

import os
import sys
import time

import torch

from horoyolo.distributed.comm import CommBroken
from horoyolo.elastic.member import open_member
from horoyolo.elastic.state import ElasticComm

NUM_BYTES = 2**28


def main(what: str) -> None:
    """Joins a generation, and leaves it when the broadcast has failed."""
    member = open_member(os.environ)
    comm = ElasticComm(member)
    member.ready()
    comm.join(member.wait_place())
    tensor = torch.full((NUM_BYTES,), comm.rank() == 0, dtype=torch.uint8)
    member.say("begun")
    if what == "idle" and comm.rank() == 0:
        time.sleep(60)
    try:
        handle = comm.broadcast_async(tensor, "large")
        while what == "send" and not tensor[0]:
            time.sleep(1e-4)
        member.say("arriving")
        handle.wait()
    except CommBroken as error:
        member.broken()
        member.say("kept", why=str(error))
        comm.leave()
    member.ready()


if __name__ == "__main__":
    main(sys.argv[1])
