"""Messages between launcher, agents and workers of an elastic job: JSON objects, one a line, over pipes and sockets.

What a worker says is under the key ``say``, what it is told under ``tell``; between launcher and agent the keys are ``is`` and ``do``.

worker -> launcher: ``ready`` (generation: the one it left, 0 at first), ``joined`` and ``broken`` (generation), ``pulse`` (step, phase, age_s,
limit_s), ``run`` (folder, step: where it goes on), ``left``, ``done``. launcher -> worker: ``alive``, ``place`` (generation, rank, size,
local_rank, local_size, cross_rank, cross_size, addr, port, iface, stop, and what workers said last of the run: folder, step), ``interrupt``
(generation), ``change`` (generation, leaving).
"""

from __future__ import annotations

import json
from typing import Any

FD = "HOROYOLO_ELASTIC_FD"  # variable: number of the worker's end of its channel, a stream socket
SLOT = "HOROYOLO_SLOT"  # which worker of its host it is, from 0
SLOTS = "HOROYOLO_SLOTS"  # workers that its host may have
MEMORY = "HOROYOLO_MEMORY"  # a folder in memory that outlives the worker, for the next one in its slot
HANG_TIMEOUT = "HOROYOLO_HANG_TIMEOUT_S"  # how long it may take for a step at least
HANG_TIMEOUT_S = 15.0
LEASE_S = 15.0  # without a word for so long, the other side counts as gone
ALIVE_EVERY_S = 3.0

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """A message as the line that is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """The messages in a stream of bytes that comes in parts of any length."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, part: bytes) -> list[Message]:
        """The messages that ``part`` completes. Raises ValueError for a line that is none."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            if not isinstance(message, dict):
                raise ValueError(f"{message!r} is no message")
        return messages
