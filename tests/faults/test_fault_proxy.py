"""The faults of the proxy, as a client and a server see them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.support.fault_proxy import Fault, FaultProxy, about, at, since

pytestmark = pytest.mark.unit
SENT = b"0123456789"
STORED = b"abcdefghijklmnop"


class Server(ThreadingHTTPServer):
    """Records the bodies of PUT requests, and answers GET with STORED."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[bytes] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_PUT(self) -> None:
        self.server.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(STORED)

    def do_GET(self) -> None:
        self.server.received.append(b"")
        self.answer(STORED)

    def do_HEAD(self) -> None:
        self.answer(STORED, with_body=False)

    def answer(self, content: bytes, with_body: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", "of this content")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.server_address) as proxy:
        yield proxy


def exchange(client: HTTPConnection) -> bytes:
    client.request("GET", "/")
    return client.getresponse().read()


def ask(
    proxy: FaultProxy,
    method: str = "PUT",
    body: bytes | None = SENT,
    timeout: float = 5.0,
    headers: Mapping[str, str] = {},
) -> tuple[int, bytes]:
    """Make a request on a connection of its own; return status and body of the reply."""
    client = HTTPConnection("127.0.0.1", proxy.port, timeout=timeout)
    try:
        client.request(method, "/bucket/name", body, headers)
        reply = client.getresponse()
        return reply.status, reply.read()
    finally:
        client.close()


def test_without_a_fault_all_is_forwarded(proxy: FaultProxy, server: Server) -> None:
    assert ask(proxy) == (200, STORED)
    assert ask(proxy, "GET", None) == (200, STORED)
    assert server.received == [SENT, b""]
    put, got = proxy.requests
    assert (put.number, put.method, put.target, put.body) == (1, "PUT", "/bucket/name", SENT)
    assert (got.number, got.fault, got.status) == (2, None, 200)


def test_a_head_keeps_its_length_and_a_connection_serves_many_requests(proxy: FaultProxy) -> None:
    client = HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    for _ in range(2):
        client.request("HEAD", "/bucket/name")
        reply = client.getresponse()
        assert reply.read() == b""
        assert reply.headers["Content-Length"] == str(len(STORED))
        assert reply.headers["ETag"] == "of this content"
    client.close()


def error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()


# The fault, what the server received, and what the client gets: a reply or an error.
ANSWERED = {
    Fault.STATUS_403: ([], 403, error("AccessDenied")),
    Fault.STATUS_409: ([], 409, error("ConditionalRequestConflict")),
    Fault.STATUS_429: ([], 429, error("TooManyRequests")),
    Fault.STATUS_500: ([], 500, error("InternalError")),
    Fault.STATUS_503: ([], 503, error("SlowDown")),
    Fault.NOT_XML: ([], 200, b"<html>Sign in to this network</html>"),
    Fault.FALSE_500: ([SENT], 500, error("InternalError")),
    Fault.DUPLICATE: ([SENT, SENT], 200, STORED),
    Fault.SHORT: ([SENT], 200, b"abcdefgh"),
    Fault.WRONG_REQUEST: ([b"0123446789"], 200, STORED),
    Fault.WRONG_REPLY: ([SENT], 200, b"abcdefghhjklmnop"),
    Fault.SLOW: ([SENT], 200, STORED),
}
BROKEN = {
    Fault.REFUSED: ([], ConnectionError),
    Fault.RESET: ([], ConnectionError),
    Fault.HANG: ([], TimeoutError),
    Fault.HANG_IN_REPLY: ([SENT], TimeoutError),
    Fault.LOST_REPLY: ([SENT], ConnectionError),
    Fault.RESET_IN_REPLY: ([SENT], ConnectionError),
    Fault.TRUNCATED: ([SENT], IncompleteRead),
}


def test_the_tables_hold_every_fault() -> None:
    assert {*ANSWERED, *BROKEN} == set(Fault)
    assert not ANSWERED.keys() & BROKEN.keys()


@pytest.mark.parametrize("fault", ANSWERED, ids=lambda fault: fault.name)
def test_a_fault_with_a_reply(fault: Fault, proxy: FaultProxy, server: Server) -> None:
    received, status, content = ANSWERED[fault]
    proxy.inject(fault, at(1))
    found, body = ask(proxy)
    assert (found, server.received) == (status, received)
    assert body == content
    assert ask(proxy) == (200, STORED)
    assert [request.fault for request in proxy.requests] == [fault, None]


@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: fault.name)
def test_a_fault_that_breaks_the_connection(
    fault: Fault, proxy: FaultProxy, server: Server
) -> None:
    received, error = BROKEN[fault]
    proxy.inject(fault, at(1))
    timeout = 0.02 if error is TimeoutError else 5.0
    with pytest.raises(error) as caught:
        ask(proxy, timeout=timeout)
    assert not isinstance(caught.value, RemoteDisconnected)  # a reset, not an orderly end
    assert server.received == received
    proxy.listen()
    assert ask(proxy) == (200, STORED)


def test_a_changed_body_is_refused_as_s3_does_if_its_digest_was_sent(
    proxy: FaultProxy, server: Server
) -> None:
    proxy.inject(Fault.WRONG_REQUEST, at(1))
    headers = {"X-Amz-Content-SHA256": hashlib.sha256(SENT).hexdigest()}
    assert ask(proxy, headers=headers) == (400, error("XAmzContentSHA256Mismatch"))
    assert ask(proxy, headers=headers) == (200, STORED)
    assert server.received == [SENT]


def test_refused_connections_come_again(proxy: FaultProxy) -> None:
    idle = HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    exchange(idle)
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        ask(proxy)
    with pytest.raises(ConnectionError):
        exchange(idle)
    idle.close()
    proxy.listen()
    assert ask(proxy) == (200, STORED)


def test_a_slow_link_takes_the_time_of_its_bytes(server: Server) -> None:
    with FaultProxy(server.server_address, rate=len(SENT + STORED) * 50) as proxy:
        proxy.inject(Fault.SLOW, about("PUT", "bucket"))
        with pytest.raises(TimeoutError):
            ask(proxy, timeout=0.01)
        assert ask(proxy) == (200, STORED)


def test_the_first_condition_that_holds_counts(proxy: FaultProxy) -> None:
    proxy.inject(Fault.STATUS_503, at(2))
    proxy.inject(Fault.STATUS_403, since(2))
    assert [ask(proxy)[0] for _ in range(4)] == [200, 503, 403, 403]
    proxy.heal()
    assert ask(proxy)[0] == 200
    proxy.restart()
    assert ask(proxy)[0] == 200
    assert [request.number for request in proxy.requests] == [1]
