"""The protocol of a data source. A source of your own subclasses Source and is named "package.module:name"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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

    def place(self, row: int) -> str:
        """Return what messages call a row, such as "row 3" or "line 5"."""
        return row_name(row)

    def n_classes(self) -> int:
        """Return the largest label + 1."""
        return max(int(y.max()) for _, _, y in self.slices()) + 1

    def check(self, n_classes: int | None) -> None:
        """Raise DataError at the first row with a non-finite value or a label outside 0..n_classes-1."""
        check_rows(self, n_classes)


def row_name(row: int) -> str:
    """Return what messages call a row, numbered from 0, of a source that has no better name for it."""
    return f"row {row}"


def check_rows(source: Source, n_classes: int | None) -> npt.NDArray[np.bool_]:
    """Look through all rows, and return which labels occur: (n_classes,); nothing if the targets are numbers.

    Raises DataError at the first row with a non-finite value or a label that is no whole number in 0..n_classes-1.
    """
    occurs = np.zeros(n_classes or 0, np.bool_)
    for first, x, y in source.slices():
        _check_finite(source, "x", first, x)
        if n_classes is None:
            _check_finite(source, "y", first, y)
        else:
            check_labels(source.origin, first, y, n_classes, source.place)
            occurs[y.astype(np.int64)] = True
    return occurs


def check_labels(
    origin: str, first_row: int, labels: Array, n_classes: int, place: Callable[[int], str] = row_name
) -> None:
    """Raise DataError at the first label that is not one of 0..n_classes-1; `place` is what messages call a row."""
    valid = (labels >= 0) & (labels < n_classes) & (labels == np.floor(labels))
    if valid.all():
        return
    wrong = int(np.flatnonzero(~valid)[0])
    label = labels[wrong]
    if label < 0 or label != np.floor(label):
        remedy = "labels are 0, 1, 2, ...: number the classes from 0 (-1 and +1 become 0 and 1)"
    else:
        remedy = "mend the row, or raise data.n_classes"
    raise DataError(f"{origin}: {place(first_row + wrong)}: label {label} is outside 0..{n_classes - 1}; {remedy}")


def label_warnings(sources: list[Source], occurs: list[npt.NDArray[np.bool_]]) -> Iterator[str]:
    """Yield what is suspect about the labels of the training rows, and of validation rows kept apart."""
    origin, trained = sources[0].origin, occurs[0]
    labels = np.flatnonzero(trained)
    if len(labels) == 1:
        yield f"{origin}: every label is {labels[0]}; a model can only learn to tell two or more classes apart"
    elif len(labels) and labels[0] > 0:
        yield (
            f"{origin}: the labels are {labels[0]}..{labels[-1]}, but classes are numbered from 0; "
            f"subtract {labels[0]}, or the model gets classes that never occur"
        )
    for source, there in zip(sources[1:], occurs[1:], strict=True):
        new = np.flatnonzero(there & ~trained)
        if len(new):
            yield f"{source.origin}: label {new[0]} does not occur in the training data"


def ranges(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of parts of n rows that fit in memory, in order."""
    step = max(1, _SLICE_BYTES // row_bytes)
    return ((first, min(first + step, n)) for first in range(0, n, step))


def count_classes(sources: list[Source]) -> int:
    """Return the largest label of all sources + 1; DataError if that is more than there are rows."""
    n_rows = sum(source.n for source in sources)
    n_classes = max(_classes_of(source) for source in sources)
    if n_classes > n_rows:
        raise DataError(
            f"{sources[0].origin}: label {n_classes - 1} makes more classes than the {n_rows} rows there are; "
            "choose the right column, or set data.n_classes"
        )
    return n_classes


def _classes_of(source: Source) -> int:
    n_classes: object = source.n_classes()
    if not isinstance(n_classes, int | np.integer):
        raise DataError(f"{source.origin}: n_classes() returned {n_classes!r}; a whole number is needed")
    if n_classes < 1:
        raise DataError(
            f"{source.origin}: the largest label is {n_classes - 1}; labels are 0, 1, 2, ...: number the classes from 0"
        )
    return int(n_classes)


class Sources(NamedTuple):
    """What a data component returns: the training rows, and validation rows if they are kept apart."""

    train: Source
    validation: Source | None = None


def _check_finite(source: Source, name: str, first: int, values: Array) -> None:
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    row = int(np.argwhere(~np.isfinite(values))[0][0])
    place = source.place(first + row)
    raise DataError(
        f"{source.origin}: {place}: {name} holds a value that is not finite as {values.dtype}; mend or drop the row"
    )
