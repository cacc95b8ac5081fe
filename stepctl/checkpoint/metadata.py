"""A sparse file in memory for HDF5's own bytes, without the arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

_PAGE_BYTES = 4096


class Metadata(io.RawIOBase):
    """A file that h5py writes into. Bytes that were never written are zero."""

    def __init__(self) -> None:
        self.size = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}

    def copy(self) -> Metadata:
        """Return an independent file of the same content."""
        other = Metadata()
        other.size = self.size
        other._pages = {number: page[:] for number, page in self._pages.items()}
        return other

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for number, in_page, in_data in _page_ranges(self._position, len(view)):
            page = self._pages.setdefault(number, bytearray(_PAGE_BYTES))
            page[in_page] = view[in_data]
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        for number, in_page, in_data in _page_ranges(self._position, len(view)):
            page = self._pages.get(number, bytes(_PAGE_BYTES))
            view[in_data] = page[in_page]
        self._position += len(view)
        return len(view)

    def read_range(self, start: int, end: int) -> bytes:
        """Return the bytes from offset `start` up to `end`."""
        data = bytearray(end - start)
        self.seek(start)
        self.readinto(data)
        return bytes(data)


def _page_ranges(start: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield (page number, slice of the page, slice of the data) for a range of bytes."""
    done = 0
    while done < length:
        number, first = divmod(start + done, _PAGE_BYTES)
        n_bytes = min(_PAGE_BYTES - first, length - done)
        yield number, slice(first, first + n_bytes), slice(done, done + n_bytes)
        done += n_bytes
