"""The protocol of a data source. A source of your own subclasses Source and is named "package.module:name"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stepctl.arena import Array, Shape
from stepctl.errors import DataError

_SLICE_BYTES = 1 << 24

Targets = Literal["classes", "values"]  # labels 0, 1, ...: (rows,) int64; or numbers: (rows, columns) float


class Source(ABC):
    """Samples by row number: anything that can read any rows of x and y."""

    origin: str  # what messages call it: a file, usually
    n: int  # rows
    sample_shape: Shape  # of one row of x
    target_shape: Shape  # of one row of y: () for classes, (columns,) for values

    @abstractmethod
    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        """Write the given rows, in that order, into x: (rows, *sample_shape) and y: (rows, *target_shape)."""

    @abstractmethod
    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        """Yield (first row, x, y) over all rows in order, in parts that fit in memory."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the data do, as far as can be told in a moment."""

    def former_fingerprint(self) -> str:
        """Return the fingerprint as an earlier stepctl recorded it, if it was another."""
        return self.fingerprint()

    def n_classes(self) -> int:
        """Return the largest label + 1."""
        return max(int(y.max()) for _, _, y in self.slices()) + 1

    def check(self, n_classes: int | None) -> None:
        """Raise DataError at the first row with a non-finite value or a label outside 0..n_classes-1."""
        for first, x, y in self.slices():
            _check_finite(self.origin, "x", first, x)
            if n_classes is None:
                _check_finite(self.origin, "y", first, y)
                continue
            wrong = np.flatnonzero(y >= n_classes)
            if wrong.size:
                raise DataError(
                    f"{self.origin}: row {first + wrong[0]}: label {y[wrong[0]]} is outside 0..{n_classes - 1}; "
                    "mend the row, or raise data.n_classes"
                )


def ranges(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of parts of n rows that fit in memory, in order."""
    step = max(1, _SLICE_BYTES // row_bytes)
    return ((first, min(first + step, n)) for first in range(0, n, step))


def count_classes(sources: list[Source]) -> int:
    """Return the largest label of all sources + 1; DataError if that is more than there are rows."""
    n_classes, n_rows = max(source.n_classes() for source in sources), sum(source.n for source in sources)
    if n_classes > n_rows:
        raise DataError(
            f"{sources[0].origin}: label {n_classes - 1} makes more classes than the {n_rows} rows there are; "
            "choose the right column, or set data.n_classes"
        )
    return n_classes


class Sources(NamedTuple):
    """What a data component returns: the training rows, and validation rows if they are kept apart."""

    train: Source
    validation: Source | None = None


def _check_finite(origin: str, name: str, first: int, values: Array) -> None:
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    row = int(np.argwhere(~np.isfinite(values))[0][0])
    raise DataError(
        f"{origin}: row {first + row}: {name} holds a value that is not finite as {values.dtype}; mend or drop the row"
    )
