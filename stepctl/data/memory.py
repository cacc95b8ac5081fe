"""A source whose rows are arrays in memory; the file formats that are read whole end here.

`arrays`, `csv` and `digits` do: every process holds the whole set. `hdf5` and `idx` read the rows of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import final

import numpy as np
import numpy.typing as npt

from stepctl.arena import Array, aligned_empty
from stepctl.data.base import Source, Targets, row_name
from stepctl.errors import DataError
from stepctl.problems import in_one_line

_LARGEST_LABEL = 2**53  # up to here a float holds every whole number


@final
class InMemory(Source):
    """Arrays x: (n, ...) and y: (n,) or (n, columns), held in the run's dtype; x is multiplied by `scale`."""

    def __init__(
        self,
        x: Array,
        y: Array,
        *,
        origin: str,
        targets: Targets,
        dtype: str,
        scale: float = 1.0,
        place: Callable[[int], str] = row_name,
    ) -> None:
        """`place` is what messages call a row."""
        self.origin = origin = in_one_line(origin)
        self._place = place
        check_arrays(origin, x, y)
        self._x = scaled(x, scale, out=aligned_empty(x.shape, dtype))
        self._y = as_targets(origin, 0, y, targets, dtype, place)
        self.n, self.sample_shape, self.target_shape = len(x), x.shape[1:], self._y.shape[1:]

    def place(self, row: int) -> str:
        return self._place(row)

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        # rows are in range by construction; "clip" lets take write straight into out
        np.take(self._x, rows, axis=0, out=x, mode="clip")
        np.take(self._y, rows, axis=0, out=y, mode="clip")

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        yield 0, self._x, self._y

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._x.shape} {self._y.shape} {self._y.dtype}".encode())
        digest.update(self._x.data)
        digest.update(self._y.data)
        return digest.hexdigest()


def check_arrays(origin: str, x: Array, y: Array) -> None:
    """Raise DataError unless x: (n, features, ...) and y: (n,) or (n, columns) are numbers, and some."""
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise DataError(f"{origin}: {name} has dtype {array.dtype}; numbers are needed")
    if x.ndim < 2:
        raise DataError(f"{origin}: x has shape {x.shape}; (rows, features, ...) is needed")
    if 0 in x.shape[1:]:
        raise DataError(f"{origin}: x has shape {x.shape}; at least one feature is needed")
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise DataError(f"{origin}: y has shape {y.shape}; (rows,) or (rows, columns) is needed")
    if len(x) != len(y):
        raise DataError(f"{origin}: x has {len(x)} rows, but y has {len(y)}; they must be equal")
    if len(x) == 0:
        raise DataError(f"{origin}: holds no rows; a data set needs at least one")


def scaled(x: Array, scale: float, *, out: Array) -> Array:
    """Write x times `scale`, of out's dtype, into out, and return it."""
    with np.errstate(over="ignore"):  # check() finds and names what overflowed
        np.multiply(x, out.dtype.type(scale), out=out, casting="unsafe")
    return out


def as_targets(
    origin: str,
    first_row: int,
    y: Array,
    targets: Targets,
    dtype: str,
    place: Callable[[int], str] = row_name,
) -> Array:
    """Return a part of y as labels: (rows,) int64, or as values: (rows, columns)."""
    if targets == "classes":
        return as_labels(origin, first_row, y, place)
    return as_values(y, dtype)


def as_labels(origin: str, first_row: int, y: Array, place: Callable[[int], str] = row_name) -> Array:
    """Return y as (rows,) int64; DataError at a label that is not a whole number from 0 on."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"{origin}: y has shape {y.shape}; a classification needs one label a row")
    wrong = np.flatnonzero(~((y >= 0) & (y < _LARGEST_LABEL) & (y == np.floor(y))))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(f"{origin}: {place(first_row + row)}: label {y[row]} is not one of 0, 1, 2, ...; mend the row")
    return np.ascontiguousarray(y, np.int64)


def as_values(y: Array, dtype: str) -> Array:
    """Return y as (rows, columns) of the run's dtype."""
    with np.errstate(over="ignore"):  # check() finds and names what overflowed
        return np.ascontiguousarray(y.reshape(len(y), math.prod(y.shape[1:])), dtype)
