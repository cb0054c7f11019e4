from __future__ import annotations

import http.client
import socket
import struct
import time

import pytest

from horoyolo.elastic.rendezvous import HEAD_LIMIT, Rendezvous


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


def test_a_request_in_pieces_holds_nobody_up(server):
    """Nor does a worker that reads its answer late."""
    value = bytes(range(256)) * 4096  # 1 MiB: more than a socket takes at once
    with socket.create_connection(("127.0.0.1", server.port)) as slow, socket.create_connection(("127.0.0.1", server.port)) as late:
        slow.sendall(b"PUT /global_gloo/1 HTTP/1.1\r\nHost: here\r\ncontent-length: 7\r\n\r\nhal")
        assert ask(server, "GET", "/global_gloo/1")[0] == 404
        assert ask(server, "PUT", "/global_gloo/2", value)[0] == 200
        late.sendall(b"GET /global_gloo/2 HTTP/1.1\r\n\r\n")
        assert ask(server, "GET", "/global_gloo/2") == (200, value)
        slow.sendall(b"fway")
        assert slow.recv(100).startswith(b"HTTP/1.0 200 OK\r\n")
        assert ask(server, "GET", "/global_gloo/1") == (200, b"halfway")
        answer = b"".join(iter(lambda: late.recv(2**16), b""))
        assert answer.partition(b"\r\n\r\n")[2] == value


NO_LENGTH, NO_NUMBER = b"PUT /a HTTP/1.1\r\n\r\n", b"PUT /a HTTP/1.1\r\nContent-Length: x\r\n\r\n"


@pytest.mark.parametrize("request_", [NO_LENGTH, NO_NUMBER, b"POST /a HTTP/1.1\r\n\r\n", b"x" * (HEAD_LIMIT + 1)])
def test_what_is_no_request_is_refused(server, request_):
    with socket.create_connection(("127.0.0.1", server.port)) as asking:
        asking.sendall(request_)
        assert asking.recv(100).split()[1] in (b"400", b"501")


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
