"""A file that holds HDF5's own bytes and not the arrays: where each array belongs is known, the rest is small."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

_PAGE = 4096


class Metadata(io.RawIOBase):
    """A sparse file in memory, for h5py to write into; what was never written reads as zeros."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._position = self.size = 0

    def copy(self) -> Metadata:
        """Return a file of its own that holds the same."""
        other = Metadata()
        other._pages = {number: page[:] for number, page in self._pages.items()}
        other.size = self.size
        return other

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for page, at, part in _parts(self._position, len(view)):
            self._pages.setdefault(page, bytearray(_PAGE))[at] = view[part]
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        for page, at, part in _parts(self._position, len(view)):
            view[part] = self._pages.get(page, bytes(_PAGE))[at]
        self._position += len(view)
        return len(view)

    def between(self, start: int, end: int) -> bytes:
        """Return the bytes of a range."""
        data = bytearray(end - start)
        self.seek(start)
        self.readinto(data)
        return bytes(data)


def _parts(start: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    done = 0
    while done < length:
        page, first = divmod(start + done, _PAGE)
        n = min(_PAGE - first, length - done)
        yield page, slice(first, first + n), slice(done, done + n)
        done += n
