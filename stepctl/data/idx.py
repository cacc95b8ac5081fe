"""IDX files, the format of MNIST, gzipped or not. Only the rows of a batch are converted.

A plain file is memory-mapped, and all processes of a machine share its pages. A gzipped file is
unpacked into the memory of every process that opens it, in the file's dtype; if that is too much,
gunzip it. The format: http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from mmap import mmap
from typing import Any, final

import numpy as np
import numpy.typing as npt

from stepctl.config.registry import File
from stepctl.data.base import Source, Sources, Targets, row_ranges
from stepctl.data.files import GZIP, TruncationGuard, map_file, prefetched, read_unpacked, reading
from stepctl.data.integers import RoundedIntegers, may_round
from stepctl.data.memory import (
    as_targets,
    check_arrays,
    fingerprint_head,
    input_dtype,
    no_targets,
    scaled,
)
from stepctl.errors import DataError
from stepctl.state.arena import Array, aligned_empty
from stepctl.system.files import open_regular
from stepctl.system.text import in_one_line

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_HEADER = 4 + 4 * 255


def idx(
    *,
    images: File,
    labels: File | None = None,
    validation_images: File | None = None,
    validation_labels: File | None = None,
    scale: float = 1 / 255,
    targets: Targets,
    dtype: str,
    integer_inputs: bool = False,
    needs_targets: bool = True,
) -> Sources:
    """Images x: (rows, height, width) and labels y: (rows,), each from its own file.

    Args:
        images: The IDX file of the training samples, gzipped or not.
        labels: The IDX file of the training targets; null for data without targets.
        validation_images: The IDX file of the validation samples; by default there is none.
        validation_labels: The IDX file of the validation targets.
        scale: Factor that the samples are multiplied by.
    """
    if labels is None and needs_targets:
        raise DataError("data.labels: is missing; the task learns from the targets")
    if labels is None and validation_labels is not None:
        raise DataError("data.labels: is missing, but there are validation_labels; give both")
    if labels is not None and (validation_images is None) != (validation_labels is None):
        raise DataError("data: give validation_images and validation_labels together, or neither")

    def load(x_file: str, y_file: str | None) -> IDXSource:
        return IDXSource(
            _open_array(x_file),
            None if y_file is None else _open_array(y_file),
            origin=x_file if y_file is None else f"{x_file} and {y_file}",
            targets=targets,
            dtype=dtype,
            scale=scale,
            integer_inputs=integer_inputs,
        )

    validation = None
    if validation_images is not None:
        validation = load(validation_images, validation_labels)
    return Sources(load(images, labels), validation)


@final
class IDXSource(Source):
    """x: (n, ...) and y: (n, ...), if there is one, kept in the dtype of their files."""

    x_dtype: np.dtype[Any]
    y_dtype: np.dtype[Any]

    def __init__(
        self,
        x: _IDXArray,
        y: _IDXArray | None,
        *,
        origin: str,
        targets: Targets,
        dtype: str,
        scale: float,
        integer_inputs: bool,
    ) -> None:
        self.origin = in_one_line(origin)
        check_arrays(self.origin, x.array, None if y is None else y.array)
        self._x = x
        self._y = y
        self._targets = targets
        self._dtype = dtype
        self._scale = scale
        self.n = len(x.array)
        self.sample_shape = x.array.shape[1:]
        self.x_dtype = input_dtype(x.array.dtype, dtype, integer_inputs=integer_inputs, scale=scale)
        first_y = self._y_slice(0, 1)
        self.y_dtype = first_y.dtype
        self.target_shape = first_y.shape[1:]

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        scaled(self._x.take(rows), self._scale, out=x)
        if self._y is not None:
            np.copyto(y, self._y.take(rows).reshape(y.shape), casting="unsafe")

    def warnings(self) -> Iterator[str]:
        rounded = RoundedIntegers(self.x_dtype, self.y_dtype)
        read = [("x", self._x, self.x_dtype)] if self._scale == 1 else []
        if self._y is not None:
            read.append(("y", self._y, self.y_dtype))
        for name, array, dtype in read:
            if not may_round(array.array.dtype, dtype):
                continue
            for first, end in self._row_ranges():
                with array.guard:
                    rounded.add(self.origin, self.place, name, first, array.array[first:end])
        yield from rounded.warnings()

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        for first, end in self._row_ranges():
            yield first, self._x_slice(first, end), self._y_slice(first, end)

    def n_classes(self) -> int:
        largest = max(int(self._y_slice(*bounds).max()) for bounds in self._row_ranges())
        return largest + 1

    def fingerprint(self) -> str:
        """Return the digest of the converted values; an InMemory source of them has the same."""
        x_shape = (self.n, *self.sample_shape)
        y_shape = (self.n, *self.target_shape)
        head = fingerprint_head(x_shape, self.x_dtype, y_shape, self.y_dtype)
        digest = hashlib.sha256(head)
        for read_slice in (self._x_slice, self._y_slice):
            for first, end in self._row_ranges():
                digest.update(read_slice(first, end).data)
        return digest.hexdigest()

    def _x_slice(self, first: int, end: int) -> Array:
        with self._x.guard:
            x = prefetched(self._x.array[first:end])
            return scaled(x, self._scale, out=aligned_empty(x.shape, self.x_dtype))

    def _y_slice(self, first: int, end: int) -> Array:
        if self._y is None:
            return no_targets(end - first)
        with self._y.guard:
            y = np.array(prefetched(self._y.array[first:end]))
        return as_targets(self.origin, first, y, self._targets, self._dtype)

    def _row_ranges(self) -> Iterator[tuple[int, int]]:
        row_bytes = math.prod(self.sample_shape) * np.dtype(self._dtype).itemsize
        return row_ranges(self.n, row_bytes)


@final
class _IDXArray:
    """An array in any byte order and alignment, and a buffer for the rows of a batch.

    It may be mapped from a file. Reads are inside `guard`, which detects a truncated file.
    """

    def __init__(self, array: Array, guard: AbstractContextManager[None]) -> None:
        self.array = array
        self.guard = guard
        # as bytes, since np.take copies an unaligned array, the whole of it, at every call
        self._bytes = _as_bytes(array)
        self._buffer = aligned_empty((0, *array.shape[1:]), array.dtype)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return these rows, in an array that is valid until the next call."""
        if len(rows) > len(self._buffer):
            self._buffer = aligned_empty((len(rows), *self.array.shape[1:]), self.array.dtype)
        taken = self._buffer[: len(rows)]
        # rows are in range by construction; "clip" lets take write straight into out
        with self.guard:
            np.take(self._bytes, rows, axis=0, out=_as_bytes(taken), mode="clip")
        return taken


def _as_bytes(rows: Array) -> Array:
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(np.uint8)


def _open_array(path: str) -> _IDXArray:
    with reading(path, "IDX"), open_regular(path) as file:
        head = file.read(len(GZIP))
        if head in (GZIP, b""):  # an empty file cannot be mapped
            file.seek(0)
            return _IDXArray(_parse_array(read_unpacked(file)), nullcontext())
        guard = TruncationGuard(file)  # before the map, which must not be longer than it expects
        return _IDXArray(_parse_array(map_file(file)), guard)


def _parse_array(data: bytes | mmap) -> Array:
    """Return the array in a file's bytes, without a copy; ValueError unless the sizes agree."""
    head = data[:_MAX_HEADER]
    size = len(data)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _DTYPES:
        raise ValueError(
            f"it begins with {head[:4].hex() or 'nothing'}, not with an IDX magic number"
        )
    dtype = np.dtype(_DTYPES[head[2]])
    n_dims = head[3]
    start = 4 + 4 * n_dims
    if size < start:
        raise ValueError(f"it ends after {size} bytes, inside its header")
    shape = tuple(int(length) for length in np.frombuffer(head, ">u4", n_dims, offset=4))
    expected = start + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"an array of shape {shape} needs a file of {expected} bytes, but it has {size}"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
