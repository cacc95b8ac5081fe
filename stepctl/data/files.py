"""Opening the files that data come from: what can go wrong there, said once."""

from __future__ import annotations

import gzip
import mmap
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from stepctl.errors import DataError
from stepctl.files import open_regular
from stepctl.problems import in_one_line

GZIP = b"\x1f\x8b"
# what the libraries that read these formats raise for a file that is not what it should be
_DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile)


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong while `path` is read as a `kind` into a DataError that names both."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{in_one_line(path)}: no such file; check the path in the config's data section") from error
    except _DAMAGE as error:
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
    if hasattr(mmap, "MADV_RANDOM"):
        memory.madvise(mmap.MADV_RANDOM)  # the pages of these rows, and none ahead of them
    return memory
