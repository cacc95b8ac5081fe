"""Object stores for tests: an S3 server of their own, and one in memory.

    with s3_server() as server:
        server.create_bucket("bucket")
        monkeypatch.setenv(...)  # each of server.environment

The server is moto's, in a process of its own on the loopback address. It checks the digests of
what it receives, as S3 does and moto does not.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stepctl.errors import CheckpointError
from stepctl.mirror.store import checked_pieces

PAGE = 7  # names in a page of a listing
_ROOT = Path(__file__).parents[2]


class S3Server(NamedTuple):
    """A running server."""

    endpoint: str  # http://127.0.0.1:PORT

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.endpoint.removeprefix("http://").partition(":")
        return host, int(port)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process uses the server."""
        return environment(self.endpoint)

    def create_bucket(self, name: str) -> None:
        """Create an empty bucket."""
        self._send("PUT", f"/{name}")

    def reset(self) -> None:
        """Remove all buckets."""
        self._send("POST", "/moto-api/reset")

    def _send(self, method: str, path: str) -> None:
        request = urllib.request.Request(f"{self.endpoint}{path}", method=method)
        with urllib.request.urlopen(request, timeout=30):
            pass


def environment(endpoint: str) -> dict[str, str]:
    """Return the variables with which a process uses the server at an endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test-key-id",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        "AWS_REGION": "us-east-1",
    }


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.object_store"],
        stdin=subprocess.PIPE,  # it ends when this process does, which closes the pipe
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)},
        text=True,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the server did not start"
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.communicate()


class MemoryStore:
    """An object store in memory."""

    url = "memory://test"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def create(self, name: str, content: bytes) -> bool:
        with self._lock:
            if name in self.objects:
                return False
            self.objects[name] = content
            return True

    def put(self, name: str, content: bytes) -> None:
        with self._lock:
            self.objects[name] = content

    def upload(self, name: str, file: BinaryIO, size: int, sha256: str) -> None:
        self.put(name, b"".join(checked_pieces(file, size, sha256, 1 << 16)))

    def get(self, name: str, max_bytes: int) -> bytes | None:
        content = self.objects.get(name)
        if content is not None and len(content) > max_bytes:
            raise CheckpointError("mirror", f"{self.url}/{name} has more than {max_bytes} bytes")
        return content

    def download(self, name: str, size: int) -> Iterator[bytes] | None:
        content = self.objects.get(name)
        if content is None:
            return None
        if len(content) != size:
            raise CheckpointError(
                "mirror", f"{self.url}/{name} has {len(content)} bytes instead of {size}"
            )
        return iter([content])

    def size(self, name: str) -> int | None:
        content = self.objects.get(name)
        return None if content is None else len(content)

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        with self._lock:
            found = [
                (name, len(content))
                for name, content in self.objects.items()
                if name.startswith(prefix) and name > after
            ]
        return iter(found)

    def delete(self, name: str) -> None:
        with self._lock:
            self.objects.pop(name, None)


# --- the server's process


class _AsS3:
    """A WSGI application: moto's, with what S3 does and moto does not.

    A body whose digest is not that of its header is refused. Requests are served one at a time, so
    that a conditional write is atomic.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        digest = hashlib.sha256(body)
        checksum = environ.get("HTTP_X_AMZ_CHECKSUM_SHA256")
        signed = environ.get("HTTP_X_AMZ_CONTENT_SHA256", "UNSIGNED-PAYLOAD")
        is_wrong = checksum not in (None, base64.b64encode(digest.digest()).decode())
        if len(signed) == 64 and signed != digest.hexdigest():
            is_wrong = True
        if is_wrong:
            start_response("400 Bad Request", [("Content-Type", "application/xml")])
            return [b"<Error><Code>BadDigest</Code></Error>"]
        with self._lock:
            return list(self._application(environ, start_response))


def _serve() -> None:
    """Print the port, and serve until standard input ends."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, _AsS3(application), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
