"""Sources whose arrays are in memory, and the checks and conversions that all sources share.

`arrays`, `csv` and `digits` read their files whole, in every rank. `hdf5` and `idx` read the rows
of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from stepctl.data.base import NO_TARGETS, Source, Targets, row_name
from stepctl.data.integers import RoundedIntegers, is_integer, kept_dtype
from stepctl.errors import DataError
from stepctl.state.arena import Array, Shape, aligned_empty
from stepctl.system.text import in_one_line

_MAX_LABEL = 2**53  # a float64 holds every integer up to here


class StoredArray(Protocol):
    """An array in a file that is read once, in blocks of rows."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield (number of the first row, rows) in order, until all rows are read."""


def _blocks(array: Array | StoredArray) -> Iterator[tuple[int, Array]]:
    if isinstance(array, np.ndarray):
        return iter([(0, array)])
    return array.blocks()


@final
class InMemory(Source):
    """Converted arrays; x: (n, ...), multiplied by `scale`; y: (n, ...), or none.

    Of a stored array no more than a block is in memory besides the converted one.
    """

    x_dtype: np.dtype[Any]
    y_dtype: np.dtype[Any]

    def __init__(
        self,
        x: Array | StoredArray,
        y: Array | StoredArray | None = None,
        *,
        origin: str,
        targets: Targets,
        dtype: str,
        scale: float = 1.0,
        integer_inputs: bool = False,
        place: Callable[[int], str] = row_name,
        warnings: Sequence[str] = (),
        decided: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """With `integer_inputs`, an integer x that is not scaled keeps its dtype.

        `place` returns the name of a row in messages; `warnings` are about the conversion to x and
        y; `decided` are values for open keys of the config.
        """
        self.origin = in_one_line(origin)
        self._place = place
        self._decided = decided
        check_arrays(self.origin, x, y)
        self.x_dtype = input_dtype(x.dtype, dtype, integer_inputs=integer_inputs, scale=scale)
        self.n = x.shape[0]
        self._y = no_targets(self.n)
        if y is not None:
            if targets == "classes":
                check_label_shape(self.origin, y.shape)
            y_shape = (self.n, *target_shape(targets, y.shape[1:]))
            self._y = np.empty(y_shape, target_dtype(targets, y.dtype, dtype))
        self.y_dtype = self._y.dtype
        self.sample_shape = x.shape[1:]
        self.target_shape = self._y.shape[1:]
        rounded = RoundedIntegers(self.x_dtype, self.y_dtype)
        self._x = aligned_empty(x.shape, self.x_dtype)
        for first, rows in _blocks(x):
            scaled(rows, scale, out=self._x[first : first + len(rows)])
            if scale == 1:
                rounded.add(self.origin, place, "x", first, rows)
        for first, rows in () if y is None else _blocks(y):
            converted = as_targets(self.origin, first, rows, targets, dtype, place)
            self._y[first : first + len(rows)] = converted
            rounded.add(self.origin, place, "y", first, rows)
        self._warnings = [*warnings, *rounded.warnings()]

    def warnings(self) -> Iterator[str]:
        yield from self._warnings

    def place(self, row: int) -> str:
        return self._place(row)

    def decided_config(self) -> Mapping[str, Any]:
        return self._decided

    def labels_in_memory(self) -> Array:
        return self._y

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        # rows are in range by construction; "clip" lets take write straight into out
        np.take(self._x, rows, axis=0, out=x, mode="clip")
        np.take(self._y, rows, axis=0, out=y, mode="clip")

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        yield 0, self._x, self._y

    def fingerprint(self) -> str:
        head = fingerprint_head(self._x.shape, self._x.dtype, self._y.shape, self._y.dtype)
        digest = hashlib.sha256(head)
        digest.update(self._x.data)
        digest.update(self._y.data)
        return digest.hexdigest()


def check_arrays(origin: str, x: Array | StoredArray, y: Array | StoredArray | None) -> None:
    """Raise DataError unless x and y, if there is one, are numeric and have rows: (n, ...)."""
    for name, array in (("x", x), ("y", y)):
        if array is not None and array.dtype.kind not in "biuf":
            raise DataError(f"{origin}: {name} has dtype {array.dtype}; numbers are needed")
    check_shapes(origin, x.shape, None if y is None else y.shape)


def check_shapes(origin: str, x_shape: Shape, y_shape: Shape | None) -> None:
    """Raise DataError unless the shapes are (n, ...), with n > 0 and without an axis of length 0."""
    for name, shape in (("x", x_shape), ("y", y_shape)):
        if shape == ():
            raise DataError(f"{origin}: {name} is a single number; (rows, ...) is needed")
    if 0 in x_shape[1:]:
        raise DataError(f"{origin}: x has shape {x_shape}; at least one feature is needed")
    n_x = x_shape[0]
    if y_shape is not None:
        if 0 in y_shape[1:]:
            raise DataError(f"{origin}: y has shape {y_shape}; at least one column is needed")
        n_y = y_shape[0]
        if n_x != n_y:
            raise DataError(f"{origin}: x has {n_x} rows, but y has {n_y}; they must be equal")
    if n_x == 0:
        raise DataError(f"{origin}: it has no rows; a data set needs at least one")


def check_label_shape(origin: str, y_shape: Shape) -> None:
    """Raise DataError unless y has one label a row: (rows,) or (rows, 1)."""
    if len(y_shape) != 1 and y_shape[1:] != (1,):
        raise DataError(f"{origin}: y has shape {y_shape}; a classification needs one label a row")


def input_dtype(
    stored: np.dtype[Any], dtype: str, *, integer_inputs: bool, scale: float
) -> np.dtype[Any]:
    """Return the dtype of x in a batch: the run's, or its own if it is to keep its integers."""
    if integer_inputs and scale == 1:
        return kept_dtype(stored, dtype)
    return np.dtype(dtype)


def no_targets(rows: int) -> Array:
    """Return the y of data without targets: (rows, 0)."""
    return np.empty((rows, *NO_TARGETS))


def target_shape(targets: Targets, stored: Shape) -> Shape:
    """Return the shape of one row of y from its stored shape."""
    if targets == "classes":
        return ()
    if targets == "values" and len(stored) <= 1:
        return (math.prod(stored),)
    return stored


def target_dtype(targets: Targets, stored: np.dtype[Any], dtype: str) -> np.dtype[Any]:
    """Return the dtype of y in a batch from its stored dtype and the run's."""
    if targets == "classes":
        return np.dtype(np.int64)
    if targets == "any":
        return kept_dtype(stored, dtype)
    return np.dtype(dtype)


def fingerprint_head(
    x_shape: Shape, x_dtype: np.dtype[Any], y_shape: Shape, y_dtype: np.dtype[Any]
) -> bytes:
    """Return the text that a fingerprint of converted values begins with.

    It names the dtype of x only if that is not the run's.
    """
    text = f"{x_shape} {y_shape} {y_dtype}"
    if is_integer(x_dtype):
        text += f" {x_dtype}"
    return text.encode()


def scaled(x: Array, scale: float, *, out: Array) -> Array:
    """Write x * scale into `out`, computed in its dtype, and return it."""
    with np.errstate(over="ignore"):  # Source.check reports an overflow with its row
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
    """Return rows of y as labels, (rows,) int64, or as numbers: (rows, *target_shape).

    `first_row` is the number of the first of them, and `place` returns a row's name in messages.
    """
    if targets == "classes":
        return as_labels(origin, first_row, y, place)
    shape = (len(y), *target_shape(targets, y.shape[1:]))
    with np.errstate(over="ignore"):  # Source.check reports an overflow with its row
        return np.ascontiguousarray(y.reshape(shape), target_dtype(targets, y.dtype, dtype))


def as_labels(
    origin: str, first_row: int, y: Array, place: Callable[[int], str] = row_name
) -> Array:
    """Return y as (rows,) int64; DataError at a label that is not an integer >= 0."""
    check_label_shape(origin, y.shape)
    y = y.reshape(len(y))
    wrong = np.flatnonzero(~((y >= 0) & (y < _MAX_LABEL) & (y == np.floor(y))))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(
            f"{origin}: {place(first_row + row)}: label {y[row]} is not one of 0, 1, 2, ...; "
            "fix the row"
        )
    return np.ascontiguousarray(y, np.int64)
