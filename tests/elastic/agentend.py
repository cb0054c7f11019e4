"""An agent's end of a worker's channel, in the hands of a test."""

from __future__ import annotations

import socket
import time

from horoyolo.elastic.channel import Lines, Message, encode

TIMEOUT_S = 30.0


class Agent:
    """Tells a worker what a launcher would, and hears what it says."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._lines = Lines()
        self._heard: list[Message] = []
        channel.settimeout(TIMEOUT_S)

    def tell(self, what: str, **more: object) -> None:
        self.channel.sendall(encode({"tell": what, **more}))

    def keep_alive(self) -> None:
        """For a thread: what a worker ends without."""
        while True:
            time.sleep(3)
            self.tell("alive")

    def hear(self, what: str) -> Message:
        """The next message of this kind."""
        while True:
            while self._heard:
                message = self._heard.pop(0)
                if message["say"] == what:
                    return message
            self._heard += self._lines.feed(self.channel.recv(4096))
