"""Opening the files that data come from: what can go wrong there, said once."""

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

from stepctl.arena import Array
from stepctl.errors import DataError
from stepctl.files import is_unavailable, unreadable
from stepctl.problems import in_one_line

GZIP = b"\x1f\x8b"
# what the libraries that read these formats raise for a file that is not what it should be
_DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile)

# Compressed data larger than this are refused where they unpack to more than so many times their size: measurements
# do not, and a file that was made to (up to 1,032 times with deflate) takes all memory, or minutes.
_ALWAYS_ALLOWED = 1 << 30  # bytes
_MOST_TIMES = 100
_PIECE = 1 << 20  # bytes unpacked at a time

_ADVICE = hasattr(mmap, "MADV_RANDOM")  # whether the system takes any


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong while `path` is read as a `kind` into a DataError that names both."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{in_one_line(path)}: no such file; check the path in the config's data section") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and is_unavailable(error):
            raise unreadable(in_one_line(path), error) from error
        reason = str(error.args[-1] if isinstance(error, KeyError) else error) or type(error).__name__
        if isinstance(error, OSError):
            reason = error.strerror or reason
        raise DataError(in_one_line(f"{path}: cannot be read as {kind}: {reason}")) from error


def read_bytes(file: BinaryIO) -> bytes:
    """Return a file's content, unpacked if it is gzipped; ValueError if it unpacks to too much."""
    packed = os.fstat(file.fileno()).st_size
    head = file.read(len(GZIP))
    file.seek(0)
    if head != GZIP:
        return file.read()
    unpacked = io.BytesIO()
    with gzip.GzipFile(fileobj=file) as pieces:
        while piece := pieces.read(_PIECE):
            unpacked.write(piece)
            refuse_excess(unpacked.tell(), packed, "gunzip it, and give the unpacked file")
    return unpacked.getvalue()


def refuse_excess(unpacked: int, packed: int, remedy: str) -> None:
    """Raise ValueError if `packed` bytes of compressed data unpack to more than data do, be it so far."""
    if unpacked > max(_ALWAYS_ALLOWED, _MOST_TIMES * packed):
        raise ValueError(
            f"{packed:,} bytes unpack to {unpacked:,} or more, over {_MOST_TIMES} times as much; "
            f"if that is right, {remedy}"
        )


@final
class WholeFile:
    """A context manager around reads of a file that stays open: DataError if the file was cut short meanwhile.

    To touch mapped memory beyond a file's end would end the process (SIGBUS), and HDF5 reads zeros there, as anybody
    does in what is missing of the last page: so the size is looked at before the rows are read, and again after.
    What is cut in that very moment still ends the process; to copy each row by a call of the system, which could not,
    takes 10 to 20 times as long.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.path = file.name
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.size = self._size()

    def __enter__(self) -> None:
        self._check()

    def __exit__(self, kind: object, *_: object) -> None:
        self._check()  # an error in between may come from it

    def _check(self) -> None:
        if (size := self._size()) < self.size:
            raise DataError(
                f"{in_one_line(self.path)}: was cut short while it was in use: {size:,} bytes are left of "
                f"{self.size:,}; put the whole file back, then run the command again"
            )

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size


def mapped(file: BinaryIO) -> mmap.mmap:
    """Return a file's bytes as memory that cannot be written to: fetched page by page, shared between processes."""
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if _ADVICE:
        memory.madvise(mmap.MADV_RANDOM)  # the pages of these rows, and none ahead of them
    return memory


def fetched(part: Array) -> Array:
    """Return a part of an array, all of which is to be read; of a mapped file, its pages are fetched in one go."""
    memory: Any = part
    while isinstance(memory, np.ndarray):
        memory = memory.base
    if isinstance(memory, memoryview):
        memory = memory.obj
    if isinstance(memory, mmap.mmap) and _ADVICE:
        pages = np.frombuffer(memory, np.uint8)
        first = part.ctypes.data - pages.ctypes.data
        end, first = first + part.nbytes, first - first % mmap.PAGESIZE
        memory.madvise(mmap.MADV_NORMAL, first, end - first)
        pages[first : end : mmap.PAGESIZE].max()
        memory.madvise(mmap.MADV_RANDOM, first, end - first)
    return part
