"""IDX files, the format of MNIST, gzipped or not: a batch converts its own rows and no others.

A file that is not gzipped is mapped, and all processes of a machine share its pages. A gzipped one is unpacked by
every process that opens it and held, in the file's own type: where that is too much, gunzip the file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from mmap import mmap
from typing import final

import numpy as np
import numpy.typing as npt

from stepctl.arena import Array, aligned_empty
from stepctl.data.base import Source, Sources, Targets, ranges
from stepctl.data.files import GZIP, WholeFile, fetched, mapped, read_bytes, reading
from stepctl.data.memory import as_targets, check_arrays, scaled
from stepctl.errors import DataError
from stepctl.files import open_regular
from stepctl.problems import in_one_line
from stepctl.registry import File

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_LONGEST_HEADER = 4 + 4 * 255


def idx(
    *,
    images: File,
    labels: File,
    validation_images: File | None = None,
    validation_labels: File | None = None,
    scale: float = 1 / 255,
    targets: Targets,
    dtype: str,
) -> Sources:
    """Images: (rows, height, width), multiplied by `scale`, and labels: (rows,), each from a file of its own."""
    if (validation_images is None) != (validation_labels is None):
        raise DataError("data: give validation_images and validation_labels together, or neither")

    def load(x_file: str, y_file: str) -> IDXRows:
        x, y = _open(x_file), _open(y_file)
        return IDXRows(x, y, origin=f"{x_file} and {y_file}", targets=targets, dtype=dtype, scale=scale)

    validation = load(validation_images, validation_labels) if validation_images and validation_labels else None
    return Sources(load(images, labels), validation)


@final
class IDXRows(Source):
    """Rows of x: (n, ...) and y: (n,) or (n, columns), which stay as their files hold them."""

    def __init__(self, x: _Rows, y: _Rows, *, origin: str, targets: Targets, dtype: str, scale: float) -> None:
        self.origin, self._targets, self._dtype = in_one_line(origin), targets, dtype
        check_arrays(self.origin, x.array, y.array)
        self._scale, self._x, self._y = scale, x, y
        self.n, self.sample_shape = len(x.array), x.array.shape[1:]
        self.target_shape = self._targets_of(0, 1).shape[1:]

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        scaled(self._x.take(rows), self._scale, out=x)
        np.copyto(y, self._y.take(rows).reshape(y.shape), casting="unsafe")

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        for first, end in self._ranges():
            yield first, self._samples(first, end), self._targets_of(first, end)

    def n_classes(self) -> int:
        return max(int(self._targets_of(first, end).max()) for first, end in self._ranges()) + 1

    def fingerprint(self) -> str:
        """Return the digest of the values that rows are converted to: what InMemory says of the same arrays."""
        y_dtype = np.dtype(self._dtype if self.target_shape else np.int64)
        digest = hashlib.sha256(f"{(self.n, *self.sample_shape)} {(self.n, *self.target_shape)} {y_dtype}".encode())
        for part in (self._samples, self._targets_of):
            for first, end in self._ranges():
                digest.update(part(first, end).data)
        return digest.hexdigest()

    def _samples(self, first: int, end: int) -> Array:
        with self._x.file:
            x = fetched(self._x.array[first:end])
            return scaled(x, self._scale, out=aligned_empty(x.shape, self._dtype))

    def _targets_of(self, first: int, end: int) -> Array:
        with self._y.file:
            y = np.array(fetched(self._y.array[first:end]))
        return as_targets(self.origin, first, y, self._targets, self._dtype)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return ranges(self.n, math.prod(self.sample_shape) * np.dtype(self._dtype).itemsize)


@final
class _Rows:
    """The rows of an array that may stand anywhere in memory, in any byte order, and room for some of them.

    The array is read inside `file`, which notices if the file that it is mapped from is cut short.
    """

    def __init__(self, array: Array, file: AbstractContextManager[None]) -> None:
        self.array, self.file = array, file
        # as bytes: of an array that is not aligned, np.take makes a copy, whole, at every call
        self._bytes = _as_bytes(array)
        self._room = aligned_empty((0, *array.shape[1:]), array.dtype)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return some rows in an array that is valid until the next call."""
        if len(rows) > len(self._room):
            self._room = aligned_empty((len(rows), *self.array.shape[1:]), self.array.dtype)
        taken = self._room[: len(rows)]
        # rows are in range by construction; "clip" lets take write straight into out
        with self.file:
            np.take(self._bytes, rows, axis=0, out=_as_bytes(taken), mode="clip")
        return taken


def _as_bytes(rows: Array) -> Array:
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(np.uint8)


def _open(path: str) -> _Rows:
    with reading(path, "IDX"), open_regular(path) as file:
        head = file.read(len(GZIP))
        if head in (GZIP, b""):  # nothing cannot be mapped
            file.seek(0)
            return _Rows(_array(read_bytes(file)), nullcontext())
        whole = WholeFile(file)  # before the map: that never holds more than this knows of
        return _Rows(_array(mapped(file)), whole)


def _array(data: bytes | mmap) -> Array:
    """Return the array that a file's bytes hold, without a copy; ValueError unless it ends where they do."""
    head, size = data[:_LONGEST_HEADER], len(data)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _DTYPES:
        raise ValueError(f"it begins with {head[:4].hex() or 'nothing'}, not with an IDX magic number")
    dtype, n_dims = np.dtype(_DTYPES[head[2]]), head[3]
    start = 4 + 4 * n_dims
    if size < start:
        raise ValueError(f"it ends after {size} bytes, inside its header")
    shape = tuple(int(length) for length in np.frombuffer(head, ">u4", n_dims, offset=4))
    expected = start + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(f"its header promises {expected} bytes for shape {shape}, but it has {size}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
