"""Opening the files that data come from: what can go wrong there, said once."""

from __future__ import annotations

import gzip
import mmap
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from stepctl.arena import Array
from stepctl.errors import DataError
from stepctl.files import is_unavailable, open_regular, unreadable
from stepctl.problems import in_one_line

GZIP = b"\x1f\x8b"
# what the libraries that read these formats raise for a file that is not what it should be
_DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile)

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


def read_bytes(path: str) -> bytes:
    """Return a file's content, unpacked if it is gzipped."""
    with open_regular(path) as file:
        data = file.read()
    return gzip.decompress(data) if data.startswith(GZIP) else data


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
