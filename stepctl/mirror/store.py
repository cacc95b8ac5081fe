"""Object stores: S3, Google Cloud Storage, Azure Blob Storage, and a directory.

    store = open_store("s3://bucket/runs/digits")
    store.create("log/0000000001-0000000000", b"...")  # False: there is one already
    for name, size in store.list("data/"):
        ...

All calls block. Credentials and endpoints come from each store's environment variables
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, GOOGLE_SERVICE_ACCOUNT,
AZURE_STORAGE_ACCOUNT_NAME, ...), never from the URL, and no message contains them.
"""

import hashlib
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from stepctl.errors import ConfigError, StepctlError, UnreadableError
from stepctl.system import store_url


class StoreUnavailable(StepctlError):
    """A request failed or its reply was lost: it may have had its effect. The text is one line."""


class ObjectStore(Protocol):
    """The operations that a mirror needs. Each is atomic, and seen by all that follow it.

    StoreUnavailable if one fails. A request that changes a single object is sent once: the caller
    decides about a retry.
    """

    @property
    def url(self) -> str:
        """The URL without a slash at its end; it contains no credentials."""

    def create(self, name: str, content: bytes) -> bool:
        """Create an object if there is none of that name; return False if there is one.

        A store may also return False for a conflict with another request, after which there may
        be no object: read it back.
        """

    def put(self, name: str, content: bytes) -> None:
        """Create or overwrite an object."""

    def upload(self, name: str, file: BinaryIO, size: int, sha256: str) -> None:
        """Create or overwrite an object with the next `size` bytes of a file, in parts if large.

        StepctlError, and no object, if the file's bytes do not have this sha256.
        """

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """Return an object's content, None if it is absent; CheckpointError if it is larger."""

    def download(self, name: str, size: int) -> Iterator[bytes] | None:
        """Return the content in pieces, None if the object is absent.

        CheckpointError if it does not have `size` bytes; StoreUnavailable if it breaks off.
        """

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes, None if it is absent."""

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        """Yield name and size of the objects below `prefix` with names greater than `after`.

        `prefix` ends with a slash; all names are complete, and come in any order. A faulty proxy
        can make a listing empty: a caller looks for a name that must be there.
        """

    def delete(self, name: str) -> None:
        """Delete an object if it exists."""


def checked_pieces(file: BinaryIO, size: int, sha256: str, piece_bytes: int) -> Iterator[bytes]:
    """Yield the next `size` bytes of a file in pieces of `piece_bytes`; the last may be shorter.

    StepctlError, before the last piece, if they do not have this sha256, or cannot be read.
    """
    digest = hashlib.sha256()
    remaining = size
    while True:
        try:
            piece = file.read(min(piece_bytes, remaining))
        except OSError as error:
            raise UnreadableError(
                f"a file of the run cannot be read now: {error.strerror}; check the disk"
            ) from error
        digest.update(piece)
        remaining -= len(piece)
        if not remaining or not piece:
            break
        yield piece
    if remaining or digest.hexdigest() != sha256:
        raise StepctlError(
            "a file of the run changed on the disk after it was written (sha256 mismatch), and is "
            "not mirrored; check the disk with: stepctl verify RUN"
        )
    yield piece


def open_store(url: str) -> ObjectStore:
    """Return the store of s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH or file:///PATH.

    No request is made. ConfigError for any other URL, for one with credentials or a query, if a
    variable of the environment is wrong, and if obstore is missing.
    """
    problem = store_url.problem(url)
    if problem is not None:
        raise ConfigError(f"the URL of the mirror {problem}")
    scheme, _, place = url.partition("://")
    bucket, _, path = place.rstrip("/").partition("/")
    if scheme == "file":
        return _directory(path)
    from stepctl.mirror.cloud_store import CloudStore

    return CloudStore(scheme, bucket, path)


def _directory(path: str) -> ObjectStore:
    """Return the store of file:///PATH, of which `path` is PATH."""
    decoded = urllib.parse.unquote(path)
    if "\0" in decoded or ".." in decoded.split("/"):
        raise ConfigError("the URL of the mirror has %00 or '..' in its path; give the path itself")
    from stepctl.mirror.file_store import FileStore

    return FileStore(Path(f"/{decoded}"))
