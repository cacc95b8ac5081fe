"""The shape and dtype of a model's input, and its preprocessing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from stepctl.config.model import TaskConfig
from stepctl.data.base import row_name
from stepctl.data.memory import input_dtype, scaled
from stepctl.data.preprocessing import Preprocessing, Rows
from stepctl.errors import DataError
from stepctl.state.arena import Array, Shape, aligned_empty

BATCH_ROWS = 1024  # of one forward pass: the last bits of a prediction depend on it


class InputFormat:
    """The shape and dtype of a model's input, and the preprocessing of raw samples."""

    def __init__(
        self,
        config: TaskConfig,
        statistics: Mapping[str, Array],
    ) -> None:
        """`statistics` are the arrays of the state's preprocessing."""
        assert config.data.sample_shape is not None
        self.shape: Shape = tuple(config.data.sample_shape)
        self.dtype = config.dtype
        self.preprocessing = Preprocessing(
            config.data, statistics, dtype=config.dtype, sample_shape=self.shape
        )
        self._integer_inputs = bool(config.data.integer_samples)

    @property
    def columns(self) -> list[str] | None:
        """The names of the input columns of a table; None if x has no columns."""
        return self.preprocessing.columns

    def batches(self, x: npt.ArrayLike, origin: str = "x", first_row: int = 0) -> Iterator[Array]:
        """Yield x in batches that the model takes; DataError if it does not fit.

        `origin` is the name of x, and `first_row` the number of its first row, in messages.
        """
        if self.columns is not None:
            rows = np.asarray(x)
            if rows.dtype.kind not in "biuf":
                rows = np.asarray(x, object)  # None stays None
            if rows.ndim != 2:
                raise DataError(
                    f"{origin}: has shape {rows.shape}, but the model takes (rows, "
                    f"{len(self.columns)}){self._remedy(rows)}"
                )
            integers = self.preprocessing.integers(rows) if self._integer_inputs else None
            if integers is not None:
                yield from in_batches(integers)
                return
            yield from in_batches(self.checked(self.preprocessing.transform(rows), origin))
            return
        array = self._array(x, origin)
        for first in range(0, max(len(array), 1), BATCH_ROWS):
            inputs = self._converted(array[first : first + BATCH_ROWS])
            yield self.checked(inputs, origin, _numbered_from(first_row + first))

    def _array(self, x: npt.ArrayLike, origin: str) -> Array:
        array = np.asarray(x)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{origin}: has dtype {array.dtype}; numbers are needed")
        n_features = math.prod(self.shape)
        if array.shape[1:] != self.shape and array.shape[1:] != (n_features,):
            needed = ", ".join(["rows", *map(str, self.shape)])
            raise DataError(
                f"{origin}: has shape {array.shape}, but the model takes ({needed})"
                f"{self._remedy(array)}"
            )
        return array

    def _remedy(self, array: Array) -> str:
        return "; for one row, give x[None]" if array.ndim == len(self.shape) else ""

    def _converted(self, rows: Array) -> Array:
        """Return numbers in the model's input dtype; integers may stay integers."""
        if self.preprocessing.arrays:  # of a table whose columns have no recorded names
            return self.preprocessing.transform(rows)
        scale = float(self.preprocessing.factors)
        dtype = input_dtype(
            rows.dtype, self.dtype, integer_inputs=self._integer_inputs, scale=scale
        )
        inputs = scaled(rows, scale, out=aligned_empty(rows.shape, dtype))
        return inputs.reshape(len(rows), *self.shape)

    def checked(self, inputs: Array, origin: str, place: Callable[[int], str] = row_name) -> Array:
        """Return preprocessed rows; DataError, with its place, at a value that is not finite."""
        if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
            row = int(np.argwhere(~np.isfinite(inputs))[0][0])
            raise DataError(
                f"{origin}: {place(row)}: has a value that is not finite as {inputs.dtype}; fix or "
                "drop the row"
            )
        return inputs

    def read(self, path: str) -> Iterator[Rows]:
        """Yield the rows of a CSV file in the model's input dtype; integers may stay integers."""
        integers = self.preprocessing.read_integers(path) if self._integer_inputs else None
        yield from integers if integers is not None else self.preprocessing.read(path)


def in_batches(x: Array) -> Iterator[Array]:
    """Yield an array in batches; an empty one is one batch."""
    for first in range(0, max(len(x), 1), BATCH_ROWS):
        yield x[first : first + BATCH_ROWS]


def _numbered_from(first: int) -> Callable[[int], str]:
    return lambda row: row_name(first + row)
