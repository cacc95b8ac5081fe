"""Opening data files: errors that name the file, limits for compressed data, memory maps."""

from __future__ import annotations

import gzip
import io
import mmap
import os
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, final

import numpy as np

from stepctl.errors import DataError
from stepctl.state.arena import Array
from stepctl.system.files import is_unavailable, unreadable
from stepctl.system.text import in_one_line

GZIP = b"\x1f\x8b"
# raised by the libraries that read these formats, for a file that is damaged or of another format
_DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile)

# Data that unpack to more than _ALWAYS_ALLOWED bytes and to more than _MAX_RATIO times their size
# are refused. Measurements do not compress that well; a file made for it (deflate reaches 1,032)
# exhausts memory or takes minutes.
_ALWAYS_ALLOWED = 1 << 30
_MAX_RATIO = 100
_CHUNK_BYTES = 1 << 20  # unpacked at a time

_HAS_MADVISE = hasattr(mmap, "MADV_RANDOM")


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """Convert an error of the block into one that names the file: `path`, read as a `kind`.

    Raises DataError for a missing or damaged file, UnreadableError for one that cannot be read now.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{in_one_line(path)}: no such file; check the path in the config's data section"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and is_unavailable(error):
            raise unreadable(in_one_line(path), error) from error
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):  # whose str is the repr of its argument
            reason = str(error.args[-1]) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise DataError(in_one_line(f"{path}: cannot be read as {kind}: {reason}")) from error


def read_unpacked(file: BinaryIO) -> bytes:
    """Return a file's content, unpacked if it is gzipped; ValueError if that is too large."""
    packed_size = os.fstat(file.fileno()).st_size
    head = file.read(len(GZIP))
    file.seek(0)
    if head != GZIP:
        return file.read()
    unpacked = io.BytesIO()
    with gzip.GzipFile(fileobj=file) as chunks:
        while chunk := chunks.read(_CHUNK_BYTES):
            unpacked.write(chunk)
            refuse_excess(unpacked.tell(), packed_size, "gunzip it, and give the unpacked file")
    return unpacked.getvalue()


@contextmanager
def open_unpacked(file: io.BufferedReader) -> Iterator[io.BufferedReader[Any]]:
    """Open a file's content, unpacked if it is gzipped; a read raises ValueError if it is too large."""
    if file.peek(len(GZIP))[: len(GZIP)] != GZIP:
        yield file
        return
    packed_size = os.fstat(file.fileno()).st_size
    with (
        gzip.GzipFile(fileobj=file) as unpacked,
        io.BufferedReader(_LimitedReader(unpacked, packed_size), _CHUNK_BYTES) as reader,
    ):
        yield reader


@final
class _LimitedReader(io.RawIOBase):
    """The content of a gzipped file, up to the size limit."""

    def __init__(self, unpacked: gzip.GzipFile, packed_size: int) -> None:
        self._unpacked = unpacked
        self._packed_size = packed_size
        self._n_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_bytes = self._unpacked.readinto(buffer)
        self._n_read += n_bytes
        refuse_excess(self._n_read, self._packed_size, "gunzip it, and give the unpacked file")
        return n_bytes


def refuse_excess(unpacked: int, packed: int, remedy: str) -> None:
    """Raise ValueError if `packed` bytes that unpack to `unpacked` or more exceed the limits."""
    if unpacked > max(_ALWAYS_ALLOWED, _MAX_RATIO * packed):
        raise ValueError(
            f"{packed:,} bytes unpack to {unpacked:,} or more, over {_MAX_RATIO} times as much; "
            f"if that is right, {remedy}"
        )


@final
class TruncationGuard:
    """A context manager around reads of an open file; DataError if the file was truncated.

    An access to mapped memory beyond a file's end kills the process (SIGBUS), and HDF5 reads zeros
    there, as does any reader of the last page. So the size is compared before and after the reads.
    A truncation between the two checks still kills the process; copying each row with a system call
    would not, but takes 10 to 20 times as long.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.path = file.name
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.size = self._current_size()

    def __enter__(self) -> None:
        self._check()

    def __exit__(self, kind: object, *_: object) -> None:
        self._check()  # also after an error, of which this may be the cause

    def _check(self) -> None:
        size = self._current_size()
        if size < self.size:
            raise DataError(
                f"{in_one_line(self.path)}: was truncated while in use, from {self.size:,} to {size:,} "
                "bytes; restore the file, then run the command again"
            )

    def _current_size(self) -> int:
        return os.fstat(self._descriptor).st_size


def map_file(file: BinaryIO) -> mmap.mmap:
    """Return a file's bytes as read-only memory: loaded by pages, shared between processes."""
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if _HAS_MADVISE:
        memory.madvise(mmap.MADV_RANDOM)  # no read-ahead: only the pages of the rows that are read
    return memory


def prefetched(rows: Array) -> Array:
    """Return these rows; if they are mapped from a file, load all their pages in one go first."""
    memory: Any = rows
    while isinstance(memory, np.ndarray):
        memory = memory.base
    if isinstance(memory, memoryview):
        memory = memory.obj
    if isinstance(memory, mmap.mmap) and _HAS_MADVISE:
        whole = np.frombuffer(memory, np.uint8)
        start = rows.ctypes.data - whole.ctypes.data
        end = start + rows.nbytes
        page_start = start - start % mmap.PAGESIZE
        memory.madvise(mmap.MADV_NORMAL, page_start, end - page_start)
        whole[page_start : end : mmap.PAGESIZE].max()
        memory.madvise(mmap.MADV_RANDOM, page_start, end - page_start)
    return rows
