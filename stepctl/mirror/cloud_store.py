"""A mirror in S3, Google Cloud Storage or Azure Blob Storage, by the package obstore."""

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, BinaryIO

from stepctl.errors import CheckpointError, ConfigError
from stepctl.mirror.store import StoreUnavailable, checked_pieces
from stepctl.system.optional import require
from stepctl.system.text import in_one_line

_IDLE_SECONDS = 30.0  # without a byte of a reply
_CONNECT_SECONDS = 10
_UNLIMITED = timedelta(days=365)
# A client cannot see the progress of what it sends, so that a request's limit follows from its size
# and an assumed rate, which falls when a limit was exceeded.
_FASTEST = 128 * 1024  # bytes per second
_SLOWEST = 4 * 1024
_PART_BYTES = 8 << 20
_MAX_PARTS = 9_000  # S3 allows 10,000
_PARTS_IN_FLIGHT = 2
_PIECE_BYTES = 1 << 20
_NAMES_PER_PAGE = 1000
_ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
# obstore reads them from the environment only if it gets no client options from the program
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "user_agent",
)
_NO_RETRY = {"max_retries": 0}
_RETRY_PART = {
    "max_retries": 3,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1)},
}
_STATUS = re.compile(r"status code: (\d{3}(?: [A-Z][A-Za-z]*)*)")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_OS_ERROR = re.compile(r'message: "([^"\n]{1,100})"')
# Without credentials in the environment, they are requested from the cloud's machine.
_NO_CREDENTIALS = {
    "/latest/api/token": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (~/.aws is not read)",
    "/latest/meta-data/": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (~/.aws is not read)",
    "/computeMetadata/": "GOOGLE_SERVICE_ACCOUNT",
    "/metadata/identity/": "AZURE_STORAGE_ACCOUNT_KEY",
}
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
_URL = re.compile(r"\w+://\S+")
_LOOKUP_ERROR = re.compile(r'error: "(failed to lookup address[^"\n]{1,100})"')
_ENDPOINT = re.compile(
    r"https?://[A-Za-z0-9.-]+(?::[0-9]{1,5})?(?:/[A-Za-z0-9/._~-]*)?|https?://\[[0-9A-Fa-f:.]+\].*"
)
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class CloudStore:
    """A bucket, or a path in one, as an `ObjectStore`."""

    def __init__(self, scheme: str, bucket: str, path: str) -> None:
        """No request is made. ConfigError if obstore is missing, or a variable is wrong."""
        self._obstore = require("obstore", "remote")
        self._place = (scheme, bucket, path)
        self._url = f"{scheme}://{bucket}/{path}".rstrip("/")
        self._rate = _FASTEST
        self._clients: dict[tuple[float | None, bool], Any] = {}
        self._client()  # finds wrong variables

    @property
    def url(self) -> str:
        """See `ObjectStore.url`."""
        return self._url

    def create(self, name: str, content: bytes) -> bool:
        """See `ObjectStore.create`."""
        from obstore.exceptions import AlreadyExistsError

        with self._sending("create", name, len(content)) as client:
            try:
                self._obstore.put(client, name, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def put(self, name: str, content: bytes) -> None:
        """See `ObjectStore.put`."""
        with self._sending("write", name, len(content)) as client:
            self._obstore.put(client, name, content, use_multipart=False)

    def upload(self, name: str, file: BinaryIO, size: int, sha256: str) -> None:
        """See `ObjectStore.upload`."""
        part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
        pieces = checked_pieces(file, size, sha256, part_bytes)
        if size <= part_bytes:
            content = b"".join(pieces)
            with self._sending("upload", name, size, retries=True) as client:
                self._obstore.put(client, name, content, use_multipart=False)
        else:
            in_flight = part_bytes * _PARTS_IN_FLIGHT
            with self._sending("upload", name, in_flight, retries=True) as client:
                self._obstore.put(
                    client,
                    name,
                    pieces,
                    use_multipart=True,
                    chunk_size=part_bytes,
                    max_concurrency=_PARTS_IN_FLIGHT,
                )
        found = self.size(name)
        if found != size:
            raise StoreUnavailable(f"{self._url}/{name}: has {found} bytes after {size} were sent")

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """See `ObjectStore.get`."""
        with contextlib.suppress(FileNotFoundError), self._errors("read", name):
            result = self._obstore.get(self._client(), name)
            if result.meta["size"] > max_bytes:
                raise CheckpointError(
                    "mirror", f"{self._url}/{name} has more than {max_bytes} bytes"
                )
            return bytes(result.bytes())
        return None

    def download(self, name: str, size: int) -> Iterator[bytes] | None:
        """See `ObjectStore.download`."""
        with contextlib.suppress(FileNotFoundError), self._errors("read", name):
            result = self._obstore.get(self._client(retries=True), name)
            found = result.meta["size"]
            if found != size:
                raise CheckpointError(
                    "mirror", f"{self._url}/{name} has {found} bytes instead of {size}"
                )
            return self._pieces(name, result)
        return None

    def size(self, name: str) -> int | None:
        """See `ObjectStore.size`."""
        with contextlib.suppress(FileNotFoundError), self._errors("read", name):
            return int(self._obstore.head(self._client(), name)["size"])
        return None

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        with self._errors("list", prefix):
            pages = self._obstore.list(
                self._client(), prefix, offset=after or None, chunk_size=_NAMES_PER_PAGE
            )
            for page in pages:
                for meta in page:
                    yield meta["path"], meta["size"]

    def delete(self, name: str) -> None:
        """See `ObjectStore.delete`."""
        with contextlib.suppress(FileNotFoundError), self._errors("delete", name):
            self._obstore.delete(self._client(), name)

    def _pieces(self, name: str, result: Any) -> Iterator[bytes]:
        with self._errors("read", name):
            for piece in result.stream(_PIECE_BYTES):
                yield bytes(piece)

    @contextlib.contextmanager
    def _sending(
        self, operation: str, name: str, n_bytes: int, *, retries: bool = False
    ) -> Iterator[Any]:
        """Yield a client that sends a request of this size."""
        seconds = _IDLE_SECONDS
        while seconds < _IDLE_SECONDS + n_bytes / self._rate:
            seconds *= 2  # powers of 2: a few limits, and so a few clients
        try:
            with self._errors(operation, name):
                yield self._client(seconds, retries=retries)
        except FileNotFoundError as error:
            raise StoreUnavailable(self._message(operation, name, error)) from error
        except StoreUnavailable as error:
            if "TimedOut" in str(error.__cause__):
                self._rate = max(self._rate // 2, _SLOWEST)
            raise

    def _client(self, limit_seconds: float | None = None, *, retries: bool = False) -> Any:
        """Return a client whose requests may take so long; None: as long as bytes arrive."""
        key = (limit_seconds, retries)
        if key not in self._clients:
            self._clients[key] = self._new_client(limit_seconds, retries)
        return self._clients[key]

    def _new_client(self, limit_seconds: float | None, retries: bool) -> Any:
        scheme, bucket, path = self._place
        if scheme == "s3":
            self._check_endpoint()
        options: dict[str, Any] = {"connect_timeout": timedelta(seconds=_CONNECT_SECONDS)}
        if limit_seconds is None:
            options["read_timeout"] = timedelta(seconds=_IDLE_SECONDS)
            options["timeout"] = _UNLIMITED
        else:
            options["timeout"] = timedelta(seconds=limit_seconds)
        for name in _CLIENT_OPTIONS:
            value = os.environ.get(f"{_ENVIRONMENT[scheme]}{name.upper()}")
            if value is not None:
                options[name] = value
        arguments: dict[str, Any] = {
            "prefix": path or None,
            "client_options": options,
            "retry_config": _RETRY_PART if retries else _NO_RETRY,
        }
        from obstore import store

        try:
            if scheme == "gs":
                return store.GCSStore(bucket, **arguments)
            if scheme == "az":
                return store.AzureStore(bucket, **arguments)
            return store.S3Store(bucket, **_s3_config(), **arguments)
        except Exception as error:  # a wrong environment variable
            raise ConfigError(
                f"{self._url}: cannot be opened with the environment variables "
                f"{_ENVIRONMENT[scheme]}...: {_reason(error)}"
            ) from error

    def _check_endpoint(self) -> None:
        """Raise ConfigError for an endpoint with which obstore would fail at each request."""
        for name in _ENDPOINT_VARIABLES:
            endpoint = os.environ.get(name, "")
            if not endpoint:
                continue
            if not _ENDPOINT.fullmatch(endpoint):
                raise ConfigError(
                    f"{self._url}: the environment variable {name} is not of the form "
                    "https://HOST:PORT"
                )
            if endpoint.startswith("http:") and "AWS_ALLOW_HTTP" not in os.environ:
                raise ConfigError(
                    f"{self._url}: the environment variable {name} is an http:// address; use "
                    "https://, or set AWS_ALLOW_HTTP=true to send data and requests unencrypted"
                )

    @contextlib.contextmanager
    def _errors(self, operation: str, name: str) -> Iterator[None]:
        """Raise an error of obstore as StoreUnavailable; that of an absent object passes."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            if any(sign in str(error) for sign in _NO_BUCKET):
                raise StoreUnavailable(self._message(operation, name, error)) from error
            raise
        except BaseError as error:
            raise StoreUnavailable(self._message(operation, name, error)) from error
        except BaseException as error:
            # a panic of obstore's own; the class cannot be imported
            if type(error).__name__ != "PanicException":
                raise
            raise StoreUnavailable(self._message(operation, name, error)) from error

    def _message(self, operation: str, name: str, error: BaseException) -> str:
        return f"{self._url}: cannot {operation} {name}: {_reason(error)}"


def _s3_config() -> dict[str, Any]:
    """Return settings that differ from obstore's defaults."""
    config: dict[str, Any] = {"disable_bulk_delete": True}  # which not every service has
    if "AWS_CHECKSUM_ALGORITHM" not in os.environ:
        config["checksum_algorithm"] = "SHA256"
    return config


def _reason(error: BaseException) -> str:
    """Return the reason of an error in a few words, without addresses, queries or headers."""
    text = str(error)
    for path, variables in _NO_CREDENTIALS.items():
        if path in text:
            return f"no credentials; set {variables}"
    status = _STATUS.search(text)
    if status is not None:
        code = _CODE.search(text)
        return f"the store answered {status[1]}" + (f" ({code[1]})" if code else "")
    if "TimedOut" in text or "timed out" in text:
        return "the store did not answer in time"
    system_error = _OS_ERROR.search(text) or _LOOKUP_ERROR.search(text)
    if system_error is not None:
        return system_error[1]
    first_line = text.partition("\n")[0]
    reason = first_line.rpartition(" - ")[2]  # before it: the request, and how long it took
    return in_one_line(_URL.sub("<address>", reason), 200)
