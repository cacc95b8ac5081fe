"""A mirror in a directory, on this machine or on a network file system.

An object is a file. It appears complete and durable, or not at all: it is written to a file in
`.tmp`, which is then linked (`create`) or renamed (`put`) to its name. Missing folders are created.
"""

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from stepctl.errors import CheckpointError, ConfigError
from stepctl.mirror.store import StoreUnavailable, checked_pieces
from stepctl.system.files import fsync, write_all
from stepctl.system.folder import Folder

_TEMPORARY = ".tmp"
_ABANDONED_SECONDS = 24 * 3600.0  # without a write to a temporary file
_PIECE_BYTES = 1 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class FileStore:
    """A directory as an `ObjectStore`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._is_clean = False

    @property
    def url(self) -> str:
        """See `ObjectStore.url`."""
        return self._root.as_uri()

    def create(self, name: str, content: bytes) -> bool:
        """See `ObjectStore.create`."""
        path = self._root / name
        with self._errors("write", name), self._temporary([content]) as temporary:
            _make_folder(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise ConfigError(
                    f"{self.url}: the file system has no hard links, which a mirror needs to create "
                    "a file only if it is absent; use another file system"
                ) from error
            Folder(path.parent).sync()
        return True

    def put(self, name: str, content: bytes) -> None:
        """See `ObjectStore.put`."""
        self._replace(name, [content])

    def upload(self, name: str, file: BinaryIO, size: int, sha256: str) -> None:
        """See `ObjectStore.upload`."""
        self._replace(name, checked_pieces(file, size, sha256, _PIECE_BYTES))

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """See `ObjectStore.get`."""
        with self._errors("read", name):
            file = self._open(name)
            if file is None:
                return None
            with file:
                content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise CheckpointError("mirror", f"{self.url}/{name} has more than {max_bytes} bytes")
        return content

    def download(self, name: str, size: int) -> Iterator[bytes] | None:
        """See `ObjectStore.download`."""
        with self._errors("read", name):
            file = self._open(name)
            if file is None:
                return None
            found = os.fstat(file.fileno()).st_size
            if found == size:
                return self._pieces(name, file)
            file.close()
        raise CheckpointError("mirror", f"{self.url}/{name} has {found} bytes instead of {size}")

    def size(self, name: str) -> int | None:
        """See `ObjectStore.size`."""
        with self._errors("read", name):
            try:
                return os.stat(self._root / name, follow_symlinks=False).st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        with self._errors("list", prefix):
            folder = self._root / prefix
            if not folder.exists():
                return
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = f"{prefix}{entry.name}"
                    if name > after and entry.is_file(follow_symlinks=False):
                        yield name, entry.stat(follow_symlinks=False).st_size

    def delete(self, name: str) -> None:
        """See `ObjectStore.delete`."""
        with self._errors("delete", name):
            (self._root / name).unlink(missing_ok=True)

    def _open(self, name: str) -> BinaryIO | None:
        """Open a regular file, None if it is absent; OSError for a link and all else."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = open(self._root / name, "rb", opener=lambda path, _: os.open(path, flags))  # noqa: SIM115
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "it is not a regular file")
        return file

    def _pieces(self, name: str, file: BinaryIO) -> Iterator[bytes]:
        with self._errors("read", name), file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def _replace(self, name: str, pieces: Iterable[bytes]) -> None:
        path = self._root / name
        with self._errors("write", name), self._temporary(pieces) as temporary:
            _make_folder(path.parent)
            temporary.replace(path)
            Folder(path.parent).sync()

    @contextlib.contextmanager
    def _temporary(self, pieces: Iterable[bytes]) -> Iterator[Path]:
        """Yield the path of a new, durable file with this content, and remove it at the end."""
        folder = self._root / _TEMPORARY
        _make_folder(folder)
        self._remove_abandoned(folder)
        path = folder / secrets.token_hex(16)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                for piece in pieces:
                    write_all(descriptor, piece)
                fsync(descriptor)
            finally:
                os.close(descriptor)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _remove_abandoned(self, folder: Path) -> None:
        """Remove, once, the temporary files of processes that were killed."""
        if self._is_clean:
            return
        self._is_clean = True
        oldest = time.time() - _ABANDONED_SECONDS
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < oldest:
                    path.unlink()

    @contextlib.contextmanager
    def _errors(self, operation: str, name: str) -> Iterator[None]:
        """Raise an OSError as StoreUnavailable."""
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(
                f"{self.url}: cannot {operation} {name}: {error.strerror}"
            ) from error


def _make_folder(path: Path) -> None:
    """Create a folder and those above it durably."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    Folder(path.parent).sync()
