"""A sum over processes by plain sockets: what the link and the kernel leave of an exchange when no library comes between."""

from __future__ import annotations

import select
import socket

import numpy as np

from horoyolo.bench.talk import Starter

TIMEOUT_S = 300.0


class SocketRing:
    """Processes in a ring, a TCP connection to the next and one from the one before."""

    def __init__(self, starter: Starter):
        self._rank, self._size = starter.rank, len(starter.hosts)
        with socket.create_server(("", 0), backlog=2) as server:
            ports = starter.allgather(server.getsockname()[1])
            following = (self._rank + 1) % self._size
            self._next = socket.create_connection((starter.hosts[following], ports[following]), TIMEOUT_S)
            server.settimeout(TIMEOUT_S)
            self._previous, _ = server.accept()
        for end in (self._next, self._previous):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        self._received = np.empty(0, np.float32)

    def allreduce(self, values: np.ndarray) -> None:
        """Replaces ``values`` (n,) float32 by its sum over processes.

        Two swap everything at once and add, one round. More send parts around the ring, every part but one twice (Patarasuk & Yuan 2009,
        Bandwidth Optimal All-reduce Algorithms).
        """
        if len(self._received) < len(values):
            self._received = np.zeros(len(values), np.float32)
        if self._size == 2:
            received = self._received[: len(values)]
            self._pass_on(values, received)
            values += received
            return
        parts = np.array_split(values, self._size)
        for step in range(self._size - 1):
            mine = parts[(self._rank - step - 1) % self._size]
            received = self._received[: len(mine)]
            self._pass_on(parts[(self._rank - step) % self._size], received)
            mine += received
        for step in range(self._size - 1):
            self._pass_on(parts[(self._rank + 1 - step) % self._size], parts[(self._rank - step) % self._size])

    def _pass_on(self, values: np.ndarray, received: np.ndarray) -> None:
        """Sends to the next and fills ``received`` from the one before, both at once."""
        out, into = values.view(np.uint8).data, received.view(np.uint8).data
        while out or into:
            readable, writable, _ = select.select([self._previous] if into else [], [self._next] if out else [], [], TIMEOUT_S)
            if not (readable or writable):
                raise TimeoutError(f"nothing moved on the ring for {TIMEOUT_S:.0f} s")
            if writable:
                out = out[self._next.send(out) :]
            if readable:
                count = self._previous.recv_into(into)
                if not count:
                    raise ConnectionError("the process before in the ring has ended")
                into = into[count:]
