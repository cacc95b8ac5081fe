"""Files of rows to predict, read in chunks, so that they may be larger than memory."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from stepctl.data.files import GZIP, reading
from stepctl.errors import DataError
from stepctl.inference.inputs import BATCH_ROWS, InputFormat, in_batches
from stepctl.state.arena import Array
from stepctl.system import files
from stepctl.system.files import open_regular
from stepctl.system.text import in_one_line

_CHUNK_BYTES = 1 << 22  # of x
_NAMES = ("x", "x_test")  # of the array in an .npz file


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows, as a model takes them. `done` is the share of the file up to their end."""

    batches: list[Array]
    done: float

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def read_chunks(path: str, inputs: InputFormat) -> Iterator[Chunk]:
    """Yield the rows of a file in order, preprocessed; DataError if it cannot be read.

    The extension decides the format: .npz (its array x, or else x_test), .npy, and any other is
    CSV. Of a CSV file `done` is known at its end only, if it is gzipped.
    """
    files.refuse_broken_link(path)
    origin = in_one_line(path)
    if not files.exists(path):
        raise DataError(f"{origin}: no such file; give the file of the rows to predict")
    extension = os.path.splitext(path)[1].lower()
    if extension == ".npz":
        with reading(path, "a NumPy archive (.npz)"), open_regular(path) as file:
            yield from _archive_chunks(file, inputs, origin)
    elif extension == ".npy":
        with reading(path, "a NumPy array (.npy)"), open_regular(path) as file:
            yield from _array_chunks(file, inputs, origin)
    else:
        yield from _csv_chunks(path, inputs, origin)


def _archive_chunks(file: IO[bytes], inputs: InputFormat, origin: str) -> Iterator[Chunk]:
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        wanted = next((name for name in _NAMES if name in names), None)
        if wanted is None:
            found = ", ".join(names) or "none"
            raise ValueError(f"it has no array x or x_test; found: {found}")
        with archive.open(f"{wanted}.npy") as member:
            yield from _array_chunks(member, inputs, origin)


def _array_chunks(file: IO[bytes], inputs: InputFormat, origin: str) -> Iterator[Chunk]:
    """Yield the rows of an array in NumPy's format."""
    if np.lib.format.read_magic(file) == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.kind not in "biuf" or not shape:
        raise ValueError(f"x has shape {shape} and dtype {dtype}; rows of numbers are needed")
    n_rows = shape[0]
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    step = max(1, _CHUNK_BYTES // (row_bytes * BATCH_ROWS)) * BATCH_ROWS
    if is_fortran:  # its rows are not consecutive
        step = max(1, n_rows)
    for first in range(0, n_rows, step):
        count = min(step, n_rows - first)
        data = file.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise ValueError(f"x ends after {first + len(data) // row_bytes} of its {n_rows} rows")
        x = np.frombuffer(data, dtype)
        if is_fortran:
            x = x.reshape(shape, order="F")
        else:
            x = x.reshape(count, *shape[1:])
        yield Chunk([*inputs.batches(x, origin, first)], (first + count) / n_rows)


def _csv_chunks(path: str, inputs: InputFormat, origin: str) -> Iterator[Chunk]:
    n_lines = _count_lines(path)
    pending: list[Array] = []
    n_pending = 0
    for rows in inputs.read(path):
        x = inputs.checked(rows.x, origin, _line_of(rows.lines))
        pending.append(x)
        n_pending += len(x)
        if n_pending >= BATCH_ROWS:
            whole = np.concatenate(pending)
            n_whole = n_pending - n_pending % BATCH_ROWS
            done = min(float(rows.lines[-1]) / n_lines, 1.0) if n_lines else 0.0
            yield Chunk([*in_batches(whole[:n_whole])], done)
            pending = [whole[n_whole:]]
            n_pending -= n_whole
    if n_pending:
        yield Chunk([np.concatenate(pending)], 1.0)


def _count_lines(path: str) -> int:
    """Return the number of lines of a file; 0 of a gzipped one."""
    with reading(path, "CSV"), open_regular(path) as file:
        if file.peek(len(GZIP))[: len(GZIP)] == GZIP:
            return 0
        blocks = iter(lambda: file.read(1 << 20), b"")
        return sum(block.count(b"\n") for block in blocks)


def _line_of(lines: Array) -> Callable[[int], str]:
    return lambda row: f"line {lines[row]}"
