"""The key-value server by which the workers of one generation find each other's addresses.

Gloo asks it while Horovod initialises: PUT stores a value, GET gives it or 404 until it is there, DELETE is a worker's word that it has
found everybody. Each generation has a server of its own, so that nothing of an earlier one can be met, on one address only, and it is
closed once the generation is up or given up. Whoever still waits for a dead one's address then fails at once instead of after Gloo's time limit.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler

VALUE_LIMIT = 2**20  # bytes; addresses of a mesh are some hundred bytes for each worker


class Rendezvous:
    """The server of one generation, open from its making until ``close``."""

    def __init__(self, address: str) -> None:
        """``address``: an IPv4 address of this machine, the only one to listen at; the port is any free one. Raises OSError."""
        self._server = _Server((address, 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens at."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Answer nobody any more; safe to call again."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # all workers come at once
    address_family = socket.AF_INET

    def __init__(self, *arguments: object) -> None:
        self.values: dict[str, bytes] = {}
        super().__init__(*arguments)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """A worker that died while it was answered is told of by its agent."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0
    server: _Server

    def do_GET(self) -> None:
        value = self.server.values.get(self.path)
        self._answer(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > VALUE_LIMIT:
            return self._answer(400)
        self.server.values[self.path] = self.rfile.read(int(length))
        return self._answer(200)

    def do_DELETE(self) -> None:
        self._answer(200)

    def _answer(self, status: int, value: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)

    def log_message(self, *arguments: object) -> None:
        pass
