from __future__ import annotations

import http.client
import socket
import struct
import time

import pytest

from horoyolo.elastic.rendezvous import Rendezvous


@pytest.fixture
def server():
    server = Rendezvous("127.0.0.1")
    yield server
    server.close()


def ask(server: Rendezvous, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_value_is_there_once_it_was_put(server):
    assert ask(server, "GET", "/global_gloo/0") == (404, b"")
    assert ask(server, "PUT", "/global_gloo/0", b"\0\xff address") == (200, b"")
    assert ask(server, "GET", "/global_gloo/0") == (200, b"\0\xff address")
    assert ask(server, "GET", "/local_gloo/0") == (404, b"")
    assert ask(server, "DELETE", "/global_gloo/0")[0] == 200
    assert ask(server, "GET", "/global_gloo/0")[0] == 200  # others may still be looking


def test_an_endless_value_is_refused(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.putrequest("PUT", "/global_gloo/0")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    assert connection.getresponse().status == 400


def test_only_its_own_address_answers(server):
    with socket.socket() as elsewhere, pytest.raises(ConnectionRefusedError):
        elsewhere.connect(("127.0.0.2", server.port))


def test_a_closed_one_refuses(server):
    server.close()
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "/global_gloo/0")
    server.close()


def test_a_worker_that_dies_while_it_asks_is_no_error(server, capfd):
    for _ in range(20):
        asking = socket.create_connection(("127.0.0.1", server.port))
        asking.sendall(b"GET /global_gloo/0 HTTP/1.1\r\n")
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        asking.close()  # by a reset
    assert ask(server, "PUT", "/global_gloo/0", b"here") == (200, b"")
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
