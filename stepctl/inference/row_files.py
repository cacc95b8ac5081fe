"""Files of rows to predict, read in chunks, so that they may be larger than memory."""

from __future__ import annotations

import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, BinaryIO

import numpy as np

from stepctl.data.base import row_name
from stepctl.data.files import reading
from stepctl.errors import DataError
from stepctl.inference.trained_model import BATCH_ROWS
from stepctl.state.arena import Array
from stepctl.system import files
from stepctl.system.files import open_regular
from stepctl.system.text import in_one_line

_CHUNK_BYTES = 1 << 24  # of x
_CSV_LINES = 8 * BATCH_ROWS
_NAMES = ("x", "x_test")  # of the array in an .npz file


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of x: (rows, ...). `done` is the share of the file up to their end.

    `place` returns the name of a row in messages, by its number among them.
    """

    x: Array
    done: float
    place: Callable[[int], str]


def read_chunks(path: str) -> Iterator[Chunk]:
    """Yield the rows of a file in order; DataError if it cannot be read.

    The extension decides the format: .npz (its array x, or else x_test), .npy, and any other is
    CSV.
    """
    files.refuse_broken_link(path)
    if not files.exists(path):
        raise DataError(f"{in_one_line(path)}: no such file; give the file of the rows to predict")
    extension = os.path.splitext(path)[1].lower()
    if extension == ".npz":
        with reading(path, "a NumPy archive (.npz)"), open_regular(path) as file:
            yield from _archive_chunks(file)
    elif extension == ".npy":
        with reading(path, "a NumPy array (.npy)"), open_regular(path) as file:
            yield from _array_chunks(file)
    else:
        with reading(path, "CSV"), open_regular(path) as file:
            yield from _csv_chunks(file)


def _archive_chunks(file: IO[bytes]) -> Iterator[Chunk]:
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        wanted = next((name for name in _NAMES if name in names), None)
        if wanted is None:
            found = ", ".join(names) or "none"
            raise ValueError(f"it has no array x or x_test; found: {found}")
        with archive.open(f"{wanted}.npy") as member:
            yield from _array_chunks(member)


def _array_chunks(file: IO[bytes]) -> Iterator[Chunk]:
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
        yield Chunk(x, (first + count) / n_rows, _numbered_from(first))


def _csv_chunks(file: BinaryIO) -> Iterator[Chunk]:
    size = os.fstat(file.fileno()).st_size
    first_line = 1
    while lines := [*itertools.islice(file, _CSV_LINES)]:
        try:
            x = np.loadtxt(lines, delimiter=",", ndmin=2, comments=None)
        except ValueError as error:
            raise ValueError(f"after line {first_line}: {str(error).partition(';')[0]}") from error
        if x.size:
            yield Chunk(x, file.tell() / size, _numbered_from(first_line))
        first_line += len(lines)


def _numbered_from(first: int) -> Callable[[int], str]:
    return lambda row: row_name(first + row)
