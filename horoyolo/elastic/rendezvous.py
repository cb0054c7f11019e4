"""The key-value server by which the workers of one generation find each other's addresses.

Gloo asks it while Horovod initialises: PUT stores a value, GET gives it or 404 until it is there, DELETE is a worker's word that it has
found everybody. Each generation has a server of its own, so that nothing of an earlier one can be met, on one address only, and it is
closed once the generation is up or given up. Whoever still waits for a dead one's address then fails at once instead of after Gloo's time limit.

Every worker asks for every other one's address, twice, in a connection each: half a million requests of 512 workers. So it is one loop over
sockets that reads no more of HTTP than Gloo writes; a thread and http.server's own parser for each took five times as long.
"""

from __future__ import annotations

import re
import selectors
import socket
import threading

VALUE_LIMIT = 2**20  # bytes; addresses of a mesh are some hundred bytes for each worker
HEAD_LIMIT = 2**14
WAITING = 1024  # connections before they are taken: all workers come at once
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 501: "Not Implemented"}
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*(?:\r\n|$)", re.IGNORECASE)


class Rendezvous:
    """The server of one generation, open from its making until ``close``."""

    def __init__(self, address: str) -> None:
        """``address``: an IPv4 address of this machine, the only one to listen at; the port is any free one. Raises OSError."""
        self._listener = socket.create_server((address, 0), backlog=WAITING)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])  # it listens at
        self._values: dict[bytes, bytes] = {}
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more; safe to call again."""
        self._end.close()
        self._thread.join()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener, self._ended:
            selector.register(self._ended, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._ended:
                        for other in list(selector.get_map().values()):
                            if isinstance(other.data, _Asking):
                                other.data.connection.close()
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif key.data.go_on(self._values):
                        selector.modify(key.fileobj, selectors.EVENT_WRITE if key.data.answer else selectors.EVENT_READ, key.data)
                    else:
                        selector.unregister(key.fileobj)
                        key.data.connection.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        """Takes all that have come; what is asked already is answered at once."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody is left, or the one that came is gone
                return
            connection.setblocking(False)
            asking = _Asking(connection)
            if asking.go_on(self._values):
                selector.register(connection, selectors.EVENT_WRITE if asking.answer else selectors.EVENT_READ, asking)
            else:
                connection.close()


class _Asking:
    """One connection: a request, its answer, and the end."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.answer = memoryview(b"")  # what is left to send of it
        self._heard = b""

    def go_on(self, values: dict[bytes, bytes]) -> bool:
        """Reads or writes what can be now; whether there is more to come. A worker that died meanwhile is told of by its agent."""
        try:
            if not self.answer:
                part = self.connection.recv(2**16)
                self._heard += part
                answer = answer_to(self._heard, values)
                if answer is None:
                    return bool(part)
                self.answer = memoryview(answer)
            self.answer = self.answer[self.connection.send(self.answer) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(self.answer)


def answer_to(heard: bytes, values: dict[bytes, bytes]) -> bytes | None:
    """The answer to a request, once the whole of it was heard; ``values`` are what it asks for or adds to."""
    head, end, body = heard.partition(b"\r\n\r\n")
    if not end:
        return _answer(400) if len(heard) > HEAD_LIMIT else None
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0]
    if method == b"GET":
        return _answer(200, values[path]) if path in values else _answer(404)
    if method == b"DELETE":
        return _answer(200)
    if method != b"PUT":
        return _answer(501)
    length = LENGTH.search(head)
    if length is None or int(length[1]) > VALUE_LIMIT:
        return _answer(400)
    if len(body) < int(length[1]):
        return None
    values[path] = body[: int(length[1])]
    return _answer(200)


def _answer(status: int, value: bytes = b"") -> bytes:
    return b"HTTP/1.0 %d %s\r\nContent-Length: %d\r\n\r\n%s" % (status, REASONS[status].encode(), len(value), value)
