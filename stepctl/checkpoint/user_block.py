"""The user block, bytes 0..511 of a checkpoint: the format version, the digest, the length.

    stepctl-checkpoint 2
    sha256: <64 hexadecimal digits>
    length: <bytes from 512 on>

padded with NUL. It is checked before the HDF5 library reads a byte.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader, FileIO
from typing import TYPE_CHECKING, NamedTuple

from stepctl.errors import CheckpointError
from stepctl.system import files

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SIZE = 512
VERSION = 2
READABLE = (1, VERSION)  # version 1 has no run_id
MAX_BYTES = 1 << 40  # larger files are refused unread
_SLICE_BYTES = 1 << 18  # compared at a time; fits into a second-level cache
_CHANGED_BY_WRITES = ("st_size", "st_mtime_ns", "st_ctime_ns")
_FIRST_LINE = re.compile(rb"stepctl-checkpoint ([0-9]{1,9})\n")
_TEXT = re.compile(
    rb"stepctl-checkpoint ([0-9]{1,9})\nsha256: ([0-9a-f]{64})\nlength: ([0-9]{1,15})\n\0*"
)


def make(digest: str, length: int) -> bytes:
    """Return the user block of a file; `digest` and `length` are of its bytes from 512 on."""
    text = f"stepctl-checkpoint {VERSION}\nsha256: {digest}\nlength: {length}\n"
    return text.encode().ljust(SIZE, b"\0")


class _RawFile(FileIO):
    """A file that keeps the last read error: the HDF5 library reports only that a read failed."""

    error: OSError | None = None

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.error = error
            raise


class Verified(NamedTuple):
    """An open file whose digest is right; `status` is from before it was read."""

    file: BufferedReader
    version: int
    digest: str
    status: os.stat_result

    @property
    def read_error(self) -> OSError | None:
        """The last error of a read, None if all succeeded."""
        raw = self.file.raw
        return raw.error if isinstance(raw, _RawFile) else None

    def is_unchanged(self) -> bool:
        """Tell whether the file was not written to since it was opened."""
        now = os.fstat(self.file.fileno())
        return all(
            getattr(now, field) == getattr(self.status, field) for field in _CHANGED_BY_WRITES
        )


def check_content(
    path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview], dir_fd: int | None = None
) -> None:
    """Raise CheckpointError unless the file holds exactly these bytes; cheaper than its digest."""
    file, _ = _open(path, dir_fd)
    buffer = bytearray(_SLICE_BYTES)
    with file:
        for expected in _slices(chunks):
            found = buffer if len(expected) == _SLICE_BYTES else bytearray(len(expected))
            if file.readinto(found) != len(expected) or found != expected:
                raise CheckpointError(
                    "digest", f"{os.path.basename(path)}: damaged (other bytes than were written)"
                )
        if file.read(1):
            raise CheckpointError(
                "length", f"{os.path.basename(path)}: damaged (longer than what was written)"
            )


def _slices(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _SLICE_BYTES):
            yield view[start : start + _SLICE_BYTES]


def open_verified(path: str | os.PathLike[str], dir_fd: int | None = None) -> Verified:
    """Open a checkpoint and verify its digest.

    With `dir_fd`, only the path's last part is used, in that directory.
    CheckpointError if it is not a regular file, too large, not a checkpoint, of another version,
    cut short, too long, or damaged. UnreadableError if it cannot be read now.
    """
    name = os.path.basename(path)
    file, status = _open(path, dir_fd)
    try:
        version, digest = _verify(file, name, status.st_size)
        return Verified(file, version, digest, status)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise files.unreadable(path, error) from error
        raise


def _open(
    path: str | os.PathLike[str], dir_fd: int | None
) -> tuple[BufferedReader, os.stat_result]:
    name = os.path.basename(path)
    place = path if dir_fd is None else name
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(place, flags, dir_fd=dir_fd)
    except OSError as error:
        if files.is_unavailable(error):
            raise files.unreadable(path, error) from error
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError("open", f"{name}: cannot be opened ({reason})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("kind", f"{name}: not a regular file")
        return BufferedReader(_RawFile(descriptor, "rb")), status
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise files.unreadable(path, error) from error
        raise


def _verify(file: BufferedReader, name: str, size: int) -> tuple[int, str]:
    """Return the format version and the digest; CheckpointError if the file is not good."""
    if size > MAX_BYTES:
        raise CheckpointError(
            "size", f"{name}: {size:,} bytes, more than the maximum of {MAX_BYTES:,}"
        )
    head = file.read(SIZE)
    first_line = _FIRST_LINE.match(head)
    # A newer version may have other lines after the first.
    if first_line is not None and int(first_line[1]) > VERSION:
        newer = f"format version {int(first_line[1])}; this one reads up to {VERSION}"
        raise CheckpointError(
            "newer", f"{name}: written by a newer stepctl ({newer}); upgrade stepctl to read it"
        )
    match = _TEXT.fullmatch(head)
    if match is None or len(head) != SIZE:
        raise CheckpointError(
            "foreign", f"{name}: not a stepctl checkpoint, or its first {SIZE} bytes are damaged"
        )
    version = int(match[1])
    digest = match[2].decode()
    length = int(match[3])
    if version not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise CheckpointError(
            "version", f"{name}: format version {version}; this stepctl reads {known}"
        )
    if size != SIZE + length:
        raise CheckpointError(
            "length", f"{name}: damaged ({size} bytes instead of {SIZE + length})"
        )
    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
        raise CheckpointError("digest", f"{name}: damaged (sha256 mismatch)")
    return version, digest
