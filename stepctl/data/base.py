"""The protocol of a data source.

A data source of your own is a function that returns `Sources`; the config names it
"package.module:function". It is called with the keys of the config, and with those of these
arguments that its signature names: `targets` (the form of y, see `Targets`), `dtype` (the run's),
`integer_inputs` (whether the model takes an integer x as it is stored) and `needs_targets`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stepctl.data.integers import RoundedIntegers
from stepctl.errors import DataError
from stepctl.state.arena import Array, Shape

_SLICE_BYTES = 1 << 24  # of x, read at a time

# classes: labels 0, 1, ..., (rows,) int64; values: (rows, columns) or (rows, ...) float; any: of the
# stored shape, with integers in their own dtype and all else in the run's
Targets = Literal["classes", "values", "any"]
NO_TARGETS: Shape = (0,)  # the target shape of data without y, whose y is (rows, 0)


class Source(ABC):
    """A data set whose rows can be read in any order."""

    origin: str  # its name in messages, usually the path of its file
    n: int  # rows
    sample_shape: Shape  # of one row of x
    target_shape: Shape  # of one row of y: () for classes, (columns,) for values, or NO_TARGETS
    # of x and y in a batch; None: x has the run's dtype, and y too unless it is labels
    x_dtype: np.dtype[Any] | None = None
    y_dtype: np.dtype[Any] | None = None

    @abstractmethod
    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        """Write these rows, in this order, into x and y.

        x: (rows, *sample_shape); y: (rows, *target_shape).
        """

    @abstractmethod
    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        """Yield (first row, x, y) for consecutive slices that fit in memory, over all rows."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the data change, as far as a quick check detects."""

    def former_fingerprint(self) -> str:
        """Return the fingerprint that an earlier version of stepctl recorded for these data."""
        return self.fingerprint()

    @property
    def has_targets(self) -> bool:
        """Whether the data have y."""
        return self.target_shape != NO_TARGETS

    def warnings(self) -> Iterator[str]:
        """Yield a warning for each array whose integers are rounded to the run's dtype."""
        return iter(())

    def place(self, row: int) -> str:
        """Return a row's name in messages, such as "row 3" or "line 5"."""
        return row_name(row)

    def labels_in_memory(self) -> Array | None:
        """Return the labels, (rows,) int64, or other targets, of data in memory; otherwise None."""
        return None

    def fit_preprocessing(self, rows: npt.NDArray[np.int64]) -> None:  # noqa: B027
        """Compute the statistics of the preprocessing from the training rows."""

    def preprocessing_arrays(self) -> Mapping[str, Array]:
        """Return the statistics by name; they are part of the state, and are restored in place."""
        return {}

    def decided_config(self) -> Mapping[str, Any]:
        """Return values for keys of the config's data section that were open."""
        return {}

    def n_classes(self) -> int:
        """Return the largest label + 1."""
        return max(int(y.max()) for _, _, y in self.slices()) + 1

    def check(self, n_classes: int | None) -> None:
        """Raise DataError at the first non-finite value or label outside 0..n_classes-1."""
        check_rows(self, n_classes)


def row_name(row: int) -> str:
    """Return the default name of a row, numbered from 0, in messages."""
    return f"row {row}"


def check_rows(
    source: Source, n_classes: int | None, rounded: RoundedIntegers | None = None
) -> npt.NDArray[np.bool_]:
    """Check all rows, and return which labels occur: (n_classes,); (0,) if the targets are values.

    Raises DataError at the first non-finite value or label that is not one of 0..n_classes-1. The
    slices' integers are added to `rounded`.
    """
    occurs = np.zeros(n_classes or 0, np.bool_)
    for first, x, y in source.slices():
        if rounded is not None:
            rounded.add(source.origin, source.place, "x", first, x)
            rounded.add(source.origin, source.place, "y", first, y)
        _check_finite(source, "x", first, x)
        if n_classes is None:
            _check_finite(source, "y", first, y)
        else:
            check_labels(source.origin, first, y, n_classes, source.place)
            occurs[y.astype(np.int64)] = True
    return occurs


def check_labels(
    origin: str,
    first_row: int,
    labels: Array,
    n_classes: int,
    place: Callable[[int], str] = row_name,
) -> None:
    """Raise DataError at the first label that is not one of 0..n_classes-1.

    labels: (rows,), from `first_row` on; `place` returns the name of a row in the message.
    """
    valid = (labels >= 0) & (labels < n_classes) & (labels == np.floor(labels))
    if valid.all():
        return
    wrong = int(np.flatnonzero(~valid)[0])
    label = labels[wrong]
    if label < 0 or label != np.floor(label):
        remedy = "labels are 0, 1, 2, ...: number the classes from 0 (-1 and +1 become 0 and 1)"
    else:
        remedy = "fix the row, or raise data.n_classes"
    raise DataError(
        f"{origin}: {place(first_row + wrong)}: label {label} is outside 0..{n_classes - 1}; {remedy}"
    )


def label_warnings(
    sources: list[Source],
    occurs: list[npt.NDArray[np.bool_]],
    class_names: Sequence[str] | None = None,
) -> Iterator[str]:
    """Yield warnings about the labels of [training source] or [training, validation source].

    occurs: for each source, which labels occur.
    """
    origin = sources[0].origin
    trained = occurs[0]
    labels = np.flatnonzero(trained)

    def shown(label: int) -> str:
        return str(label) if class_names is None else repr(class_names[label])

    if len(labels) == 1:
        yield (
            f"{origin}: every label is {shown(labels[0])}; classification needs two or more classes"
        )
    elif class_names is not None and not trained.all():
        absent = int(np.flatnonzero(~trained)[0])
        yield f"{origin}: class {shown(absent)} does not occur in the training data"
    elif len(labels) and labels[0] > 0:
        yield (
            f"{origin}: the labels are {labels[0]}..{labels[-1]}, but classes are numbered from 0; "
            f"subtract {labels[0]}, otherwise the model has classes without samples"
        )
    for source, there in zip(sources[1:], occurs[1:], strict=True):
        new = np.flatnonzero(there & ~trained)
        if len(new):
            yield f"{source.origin}: label {shown(new[0])} does not occur in the training data"


def row_ranges(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of consecutive ranges of n rows that fit in memory."""
    step = max(1, _SLICE_BYTES // row_bytes)
    for first in range(0, n, step):
        yield first, min(first + step, n)


def count_classes(sources: list[Source]) -> int:
    """Return the largest label of all sources + 1; DataError if that exceeds the number of rows."""
    n_rows = sum(source.n for source in sources)
    n_classes = max(_classes_of(source) for source in sources)
    if n_classes > n_rows:
        raise DataError(
            f"{sources[0].origin}: label {n_classes - 1} implies {n_classes} classes, but there are "
            f"only {n_rows} rows; choose the right column, or set data.n_classes"
        )
    return n_classes


def _classes_of(source: Source) -> int:
    n_classes: object = source.n_classes()
    if not isinstance(n_classes, int | np.integer):
        raise DataError(f"{source.origin}: n_classes() returned {n_classes!r}; return an integer")
    if n_classes < 1:
        raise DataError(
            f"{source.origin}: the largest label is {n_classes - 1}; labels are 0, 1, 2, ...: "
            "number the classes from 0"
        )
    return int(n_classes)


class Sources(NamedTuple):
    """The training source, and a validation source if the validation data are separate."""

    train: Source
    validation: Source | None = None


def _check_finite(source: Source, name: str, first: int, values: Array) -> None:
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    row = int(np.argwhere(~np.isfinite(values))[0][0])
    place = source.place(first + row)
    raise DataError(
        f"{source.origin}: {place}: {name} has a value that is not finite as {values.dtype}; "
        "fix or drop the row"
    )
