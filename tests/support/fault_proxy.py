"""An HTTP proxy on loopback that injects faults between a client and a server.

    with FaultProxy(("127.0.0.1", port_of_server)) as proxy:
        proxy.inject(Fault.LOST_REPLY, at(3))
        ...  # a client of proxy.url
        assert proxy.requests[2].fault is Fault.LOST_REPLY

Requests are numbered from 1 in the order in which their heads arrive. A fault is chosen when the head is there, before
the body is read. Bodies are held in memory.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

Address = tuple[str, int]
HOST = "127.0.0.1"
SLOW_RATE = 10_000  # bytes per second
PIECE = 1000  # bytes between two pauses of a slow link
REFUSAL = 0.2  # seconds for which connections are refused
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_SHA256 = re.compile("[0-9a-f]{64}")
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST


class Fault(enum.Enum):
    """What happens to a request. The server sees it only where that is said."""

    REFUSED = "connections are reset, and refused for a while"
    RESET = "the connection is reset after half of the request's body"
    STATUS_403 = "403 Forbidden"
    STATUS_409 = "409 Conflict"
    STATUS_429 = "429 Too Many Requests"
    STATUS_500 = "500 Internal Server Error"
    STATUS_503 = "503 Service Unavailable"
    NOT_XML = "200 OK from something that is not a store"
    HANG = "nothing is answered"
    HANG_IN_REPLY = "the server acts; half of the reply is sent, and then nothing"
    LOST_REPLY = "the server acts; the connection is reset before the reply"
    FALSE_500 = "the server acts; the reply is 500"
    DUPLICATE = "the server acts twice; the reply is the second one"
    RESET_IN_REPLY = "the server acts; the connection is reset after half of the reply's body"
    TRUNCATED = "the server acts; half of the reply's body is sent, with the length of the whole"
    SHORT = "the server acts; half of the reply's body is sent, with the length of the half"
    WRONG_REQUEST = (
        "a byte in the middle of the request's body is changed; refused if a digest was sent"
    )
    WRONG_REPLY = "the server acts; a byte in the middle of the reply's body is changed"
    SLOW = "the bodies of request and reply are carried at a low rate"


_STATUS = {
    Fault.STATUS_403: (403, "Forbidden", "AccessDenied"),
    Fault.STATUS_409: (409, "Conflict", "ConditionalRequestConflict"),
    Fault.STATUS_429: (429, "Too Many Requests", "TooManyRequests"),
    Fault.STATUS_500: (500, "Internal Server Error", "InternalError"),
    Fault.STATUS_503: (503, "Service Unavailable", "SlowDown"),
}


@dataclass(frozen=True)
class Request:
    """A request as it came from the client, the fault that it met, and the server's answer."""

    number: int
    method: str
    target: str
    headers: list[tuple[str, str]] = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    fault: Fault | None = None
    status: int | None = None


@dataclass(frozen=True)
class Reply:
    """An answer; `length` is the Content-Length that it states."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    length: int

    def head(self) -> bytes:
        """Return the status line and the headers."""
        headers = [*self.headers, ("Content-Length", str(self.length))]
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{k}: {v}" for k, v in headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


When = Callable[[Request], bool]


def at(*numbers: int) -> When:
    """Return a condition: the request has one of the numbers."""
    return lambda request: request.number in numbers


def since(number: int) -> When:
    """Return a condition: the request has this number or a later one."""
    return lambda request: request.number >= number


def about(method: str, part: str = "") -> When:
    """Return a condition: the request has this method, and this text in its target."""
    return lambda request: request.method == method and part in request.target


class FaultProxy:
    """Forwards HTTP/1.1 from a port of its own to a server, and injects faults. Ends with its `with` block.

    The server gets one request at a time: moto's conditional writes are not atomic.
    """

    def __init__(self, upstream: Address, rate: int = SLOW_RATE) -> None:
        self.upstream = upstream
        self.rate = rate
        self.closed = threading.Event()
        self.forwarding = threading.Lock()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_flight = 0
        self._requests: list[Request] = []
        self._faults: list[tuple[Fault, When]] = []
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        # The keeper holds the port, without listening, while connections are refused.
        self._keeper = _bound(0)
        self.port: int = self._keeper.getsockname()[1]
        self._listener: socket.socket | None = None
        self.listen()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed.set()
        self.refuse()
        self._keeper.close()
        for thread in self._threads:
            thread.join()

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"http://{HOST}:{self.port}"

    @property
    def requests(self) -> list[Request]:
        """The requests so far, by number; their bodies, faults and status once they are known."""
        with self._lock:
            return list(self._requests)

    @property
    def n_requests(self) -> int:
        """The number of requests so far."""
        return len(self._requests)

    @property
    def n_in_flight(self) -> int:
        """The number of requests that are not answered yet."""
        return self._in_flight

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until no request is in flight: what a killed client sent has reached the server."""
        with self._idle:
            assert self._idle.wait_for(lambda: self._in_flight == 0, seconds), "still in flight"

    def inject(self, fault: Fault, when: When) -> None:
        """Inject a fault into the requests that fulfil a condition; the first one that was set counts."""
        with self._lock:
            self._faults.append((fault, when))

    def heal(self) -> None:
        """Forward all that comes from now on."""
        with self._lock:
            self._faults.clear()
        self.listen()

    def restart(self) -> None:
        """Remove the faults, and number requests from 1 again."""
        self.heal()
        with self._lock:
            self._requests.clear()

    def listen(self) -> None:
        """Accept connections."""
        with self._lock:
            if self._listener is not None or self.closed.is_set():
                return
            self._listener = _bound(self.port)
            self._listener.listen(64)
            self._start(self._accept, self._listener)

    def refuse(self) -> None:
        """Reset all connections, and refuse new ones until `listen`."""
        with self._lock:
            listener, self._listener = self._listener, None
            if listener is not None:
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread, which closes it
            for connection in self._connections:
                _reset(connection)
            self._connections.clear()

    def refuse_for(self, seconds: float) -> None:
        """Reset all connections, and refuse new ones for a while."""
        self.refuse()

        def listen_again() -> None:
            self.closed.wait(seconds)
            self.listen()

        with self._lock:
            self._start(listen_again)

    def register(self, request: Request, connection: socket.socket) -> Request:
        """Number a request, and choose its fault."""
        with self._lock:
            if connection not in self._connections:  # it came after `refuse`
                raise _Reset
            request = replace(request, number=len(self._requests) + 1)
            fault = next((fault for fault, when in self._faults if when(request)), None)
            request = replace(request, fault=fault)
            self._requests.append(request)
            self._in_flight += 1
        return request

    def finish(self) -> None:
        """Count a request as answered."""
        with self._idle:
            self._in_flight -= 1
            self._idle.notify_all()

    def update(self, request: Request) -> None:
        """Record what became known of a request, unless it is from before a restart."""
        with self._lock:
            for known in self._requests[request.number - 1 : request.number]:
                if (known.method, known.target) == (request.method, request.target):
                    self._requests[request.number - 1] = request

    def _start(self, target: Callable[..., object], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=arguments, name="fault-proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                with self._lock:
                    if self._listener is not listener:
                        connection.close()
                        return
                    self._connections.add(connection)
                    self._start(self._serve, connection, address)

    def _serve(self, connection: socket.socket, address: Address) -> None:
        try:
            with contextlib.suppress(OSError, HTTPException, _Reset):  # the client left, or must
                _Handler(connection, address, self)  # type: ignore[arg-type]  # no BaseServer
        finally:
            with self._lock:
                self._connections.discard(connection)
                connection.close()


class _Reset(Exception):
    """The connection is to be reset."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        assert "Transfer-Encoding" not in self.headers, "a body must have a length"
        headers = list(self.headers.items())
        request = Request(0, self.command, self.path, headers)
        request = self.proxy.register(request, self.connection)
        try:
            self.wfile.write(b"".join(self._answer(request)))
        except _Reset:
            _reset(self.connection)
            raise
        finally:
            self.proxy.finish()

    @property
    def proxy(self) -> FaultProxy:
        proxy: FaultProxy = self.server
        return proxy

    def _answer(self, request: Request) -> Iterable[bytes]:
        """Treat a request as its fault demands; return what is to be sent, if anything."""
        fault = request.fault
        if fault is Fault.REFUSED:
            self.proxy.refuse_for(REFUSAL)
            raise _Reset
        if fault is Fault.RESET:
            self.rfile.read(self._length() // 2)
            raise _Reset
        request = replace(request, body=self._body(slow=fault is Fault.SLOW))
        self.proxy.update(request)
        if fault is Fault.HANG:
            self._hang()
        if fault in _STATUS:
            return _whole(_error(*_STATUS[fault]))
        if fault is Fault.NOT_XML:
            return _whole(_reply(200, "OK", "<html>Sign in to this network</html>"))
        if fault is Fault.WRONG_REQUEST:
            request = replace(request, body=_damaged(request.body))
            if not _matches_digest(request):
                return _whole(_error(400, "Bad Request", "XAmzContentSHA256Mismatch"))
        if fault is Fault.DUPLICATE:
            self._forward(request)
        reply = self._forward(request)
        self.proxy.update(replace(request, status=reply.status))
        return self._altered(reply, fault)

    def _altered(self, reply: Reply, fault: Fault | None) -> Iterable[bytes]:
        """Return what is sent of the server's reply."""
        half = reply.body[: len(reply.body) // 2]
        if fault is Fault.LOST_REPLY:
            raise _Reset
        if fault in (Fault.RESET_IN_REPLY, Fault.HANG_IN_REPLY, Fault.TRUNCATED):
            self.wfile.write(reply.head() + half)
            if fault is Fault.RESET_IN_REPLY:
                raise _Reset
            if fault is Fault.HANG_IN_REPLY:
                self._hang()
            self.close_connection = True
            return []
        if fault is Fault.FALSE_500:
            return _whole(_error(*_STATUS[Fault.STATUS_500]))
        if fault is Fault.SHORT:
            return _whole(replace(reply, body=half, length=len(half)))
        if fault is Fault.WRONG_REPLY:
            return _whole(replace(reply, body=_damaged(reply.body)))
        if fault is Fault.SLOW:
            self.wfile.write(reply.head())
            for piece in _pieces(reply.body):
                self._pause(len(piece))
                self.wfile.write(piece)
            return []
        return _whole(reply)

    def _length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def _body(self, slow: bool) -> bytes:
        length = self._length()
        if not slow:
            return self.rfile.read(length)
        pieces = []
        while length > 0:
            piece = self.rfile.read(min(PIECE, length))
            if not piece:
                raise _Reset
            self._pause(len(piece))
            length -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _pause(self, size: int) -> None:
        """Wait as long as so many bytes take on a slow link."""
        if self.proxy.closed.wait(size / self.proxy.rate):
            raise _Reset

    def _hang(self) -> None:
        """Wait until the client leaves, or the proxy is closed."""
        self.connection.settimeout(0.05)
        while not self.proxy.closed.is_set():
            try:
                if not self.connection.recv(1):
                    break
            except TimeoutError:
                continue
        raise _Reset

    def _forward(self, request: Request) -> Reply:
        upstream = HTTPConnection(*self.proxy.upstream)
        with self.proxy.forwarding, contextlib.closing(upstream):
            upstream.putrequest(
                request.method, request.target, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers:
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            if request.body or self.headers.get("Content-Length"):
                upstream.putheader("Content-Length", str(len(request.body)))
            upstream.endheaders(request.body or None)
            response = upstream.getresponse()
            body = response.read()
            stated = response.getheader("Content-Length")
            headers = [(k, v) for k, v in response.getheaders() if k.lower() not in _HOP]
            length = len(body)
            if request.method == "HEAD" and stated is not None:
                length = int(stated)
            return Reply(response.status, response.reason, headers, body, length)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((HOST, port))
    return bound


def _reset(connection: socket.socket) -> None:
    """Have the connection closed with RST by the thread that serves it."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        connection.shutdown(socket.SHUT_RD)


def _whole(reply: Reply) -> Iterable[bytes]:
    return [reply.head(), reply.body]


def _reply(status: int, reason: str, text: str) -> Reply:
    body = text.encode()
    return Reply(status, reason, [("Content-Type", "application/xml")], body, len(body))


def _error(status: int, reason: str, code: str) -> Reply:
    return _reply(status, reason, f"<Error><Code>{code}</Code><Message>injected</Message></Error>")


def _matches_digest(request: Request) -> bool:
    """Tell whether the body has the sha256 that the request was signed with; S3 refuses it if not."""
    headers = {name.lower(): value for name, value in request.headers}
    signed = headers.get("x-amz-content-sha256", "")
    return not _SHA256.fullmatch(signed) or hashlib.sha256(request.body).hexdigest() == signed


def _damaged(content: bytes) -> bytes:
    if not content:
        return content
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]
