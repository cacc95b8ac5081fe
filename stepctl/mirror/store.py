"""Object stores: S3, Google Cloud Storage, Azure Blob Storage, and a directory.

    store = open_store("s3://bucket/runs/digits")
    store.create("owners/0000000001", b"...")  # False: there is one already
    for name, size in store.list("manifests/"):
        ...

All calls block. Nothing is retried here: a caller that wants to continue after StoreUnavailable
repeats its whole operation. Credentials and endpoints come from each store's environment variables
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_...),
never from the URL, and no message contains them.
"""

from collections.abc import Iterator
from typing import BinaryIO, Protocol

from stepctl.errors import StepctlError


class StoreUnavailable(StepctlError):
    """A request failed or its reply was lost: it may have had its effect. The text is one line."""


class ObjectStore(Protocol):
    """The operations that a mirror needs. Each is atomic, and seen by all that follow it."""

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
        """Yield name and size of the objects below `prefix`, in order of their names.

        `prefix` ends with a slash; names are complete. With `after`, only names greater than it.
        """

    def delete(self, name: str) -> None:
        """Delete an object if it exists."""


def open_store(url: str) -> ObjectStore:
    """Return the store of s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH or file:///PATH.

    No request is made. ConfigError for any other URL, and for one with credentials or a query.
    """
    raise NotImplementedError
