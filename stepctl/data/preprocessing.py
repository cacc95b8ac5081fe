"""Preprocessing of raw rows for a model; all that it needs is in a checkpoint.

    preprocessing = Preprocessing(config.data, arrays, dtype="float32")
    for rows in preprocessing.read("new.csv"):     # in chunks; the target is ignored
        rows.x                                     # (rows, *sample_shape), as in training
        rows.lines                                 # the line of the file on which each row begins
    x = preprocessing.transform([["5.1", "red", "yes"]])   # cells in the order of `columns`
    preprocessing.class_names[label]

`config` is the resolved config of a checkpoint, in which everything that was decided from the training
data is written (`names`, `encodings`, `class_names`, ...), and `arrays` are its arrays below
`/buffers/preprocessing/`, by name ("fill", "mean", "deviation"); there are none without
`missing: mean` and `standardize`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from stepctl.config import registry
from stepctl.config.model import DataConfig
from stepctl.data.columns import CellError, Encoding
from stepctl.data.csv_file import CSVFile, Head
from stepctl.data.files import reading
from stepctl.data.integers import is_integer
from stepctl.data.memory import scaled
from stepctl.data.statistics import Statistics
from stepctl.data.table import (
    ColumnChoice,
    Table,
    TableRows,
    choose_columns,
    statistics_of,
    with_encodings,
)
from stepctl.errors import DataError
from stepctl.state.arena import Array, Shape, aligned_empty

CSV = "csv"  # the name of the source whose rows have columns
_MAX_EXACT = 2.0**53  # a float64 holds every integer below it
FOLDER = "preprocessing"  # of the statistics, below /buffers in a checkpoint


class Rows(NamedTuple):
    """Some consecutive rows of a file.

    x: (rows, *sample_shape); lines: (rows,) int64.
    """

    x: Array
    lines: npt.NDArray[np.int64]


@final
class Preprocessing:
    """The preprocessing of a run's data, from its resolved config and its statistics."""

    def __init__(
        self,
        data: DataConfig,
        arrays: Mapping[str, Array] | None = None,
        *,
        dtype: str,
        sample_shape: Shape | None = None,
    ) -> None:
        """
        data: the resolved section; arrays: by name, which are copied; None if they are restored
        later into the property `arrays`. dtype: of the run.
        sample_shape: of one row of x, for sources whose rows have no named columns, and for
        checkpoints of versions that did not record the columns.

        DataError if the arrays do not fit the config.
        """
        spec = data.spec()
        self._dtype = dtype
        self._scale = scale_of(spec)
        self._names = data.class_names
        self._n_classes = data.n_classes
        self._sample_shape = sample_shape
        if sample_shape is None and data.sample_shape is not None:
            self._sample_shape = tuple(data.sample_shape)
        self._spec: dict[str, Any] = {"target": -1, "missing": "error"}
        self._table = None
        if data.name == CSV:
            self._spec |= spec
            self._table = table_of(self._spec, self._names)
        self._statistics = self._new_statistics()
        if arrays is not None:
            _restore(self._statistics, arrays)

    def _new_statistics(self) -> Statistics:
        standardize = self._spec.get("standardize", False)
        if self._table is not None:
            return statistics_of(self._table, standardize=standardize)
        n_features = math.prod(self._sample_shape or ())
        return Statistics(
            [str(number) for number in range(n_features)],
            is_number=[True] * n_features,
            fill=self._spec["missing"] == "mean",
            standardize=standardize,
        )

    @property
    def arrays(self) -> dict[str, Array]:
        """The statistics by name, as a checkpoint has them; there may be none."""
        return self._statistics.arrays

    @property
    def columns(self) -> list[str] | None:
        """The names of the input columns, in order; None if the rows have no columns."""
        if self._table is None:
            return None
        return [str(column.name) for column in self._table.inputs]

    @property
    def feature_names(self) -> list[str] | None:
        """The names of the features, in the order of x; None if the rows have no columns."""
        return None if self._table is None else self._table.feature_names

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in the order of the labels; None if there are no classes."""
        if self._names is not None:
            return [*self._names]
        if self._n_classes is None:
            return None
        return [str(number) for number in range(self._n_classes)]

    @property
    def factors(self) -> Array:
        """The factor of each value of a sample: (features,) of a table, otherwise () or (1,)."""
        if self._table is None:
            return np.array(self._scale)
        return np.where(self._table.is_number, self._scale, 1.0)

    def transform(self, rows: Array | Sequence[Sequence[object]]) -> Array:
        """Return raw samples as a model's input: (rows, *sample_shape) in the run's dtype.

        rows: (rows, ...) numbers; or for a table rows of its input cells, in the order of `columns`:
        texts, numbers, booleans, or None for a missing value. DataError names row and column of a
        cell that does not fit.
        """
        if self._table is None:
            samples = np.asarray(rows)
            shape = (len(samples), *(self._sample_shape or samples.shape[1:]))
            out = aligned_empty(samples.shape, self._dtype)
            if not self.arrays:
                return scaled(samples, self._scale, out=out).reshape(shape)
            features = scaled(samples, self._scale, out=np.empty(samples.shape))
            self._statistics.apply(features, out=out)
            return out.reshape(shape)
        if isinstance(rows, np.ndarray) and rows.dtype.kind in "biuf":
            numbers = self._table.numbers(rows)
            if numbers is not None:
                return self._completed(self._table, numbers)
        cells = [[_cell_text(value) for value in row] for row in rows]
        for number, row in enumerate(cells):
            if len(row) != len(self._table.inputs):
                raise DataError(
                    f"row {number}: {len(row)} cells, but the run was trained on "
                    f"{len(self._table.inputs)} columns: {', '.join(self.columns or ())}"
                )
        try:
            features = self._table.encode_cells(cells)
        except CellError as error:
            raise DataError(f"row {error.row}: {error}") from error
        return self._completed(self._table, features)

    def _completed(self, table: Table, features: Array) -> Array:
        """Return features, of which none may be missing without a fill, as a model's input."""
        try:
            found = TableRows(features, None, np.arange(len(features)))
            table.complete(found, may_drop=False, noun="row")
        except ValueError as error:
            raise DataError(str(error)) from error
        return self._finish(table, features)

    def integers(self, rows: Array) -> Array | None:
        """Return raw samples of a table, (rows, inputs), as the integers that they are.

        None if they are not all integers of 64 bits, or if preprocessing changes them.
        """
        if self._table is None or not self._keeps_integers(self._table):
            return None
        if rows.shape[1:] != (len(self._table.inputs),):
            return None
        if is_integer(rows.dtype):
            return rows.astype(rows.dtype.newbyteorder("="), copy=False)
        if rows.dtype.kind == "f" and (abs(rows) < _MAX_EXACT).all():
            integers = rows.astype(np.int64)
            return integers if np.array_equal(integers, rows) else None
        return None

    def _keeps_integers(self, table: Table) -> bool:
        return self._scale == 1 and not self.arrays and all(table.is_number)

    def read_integers(self, path: str) -> Iterator[Rows] | None:
        """Return the rows of a CSV file as `read` does, but with the integers that are written there.

        None if not all of its inputs are written as integers, or if preprocessing changes them.
        """
        with reading(path, CSV.upper()):
            table = self._table or self._table_like(path)
            found = table.integer_rows(path) if self._keeps_integers(table) else None
        if found is None:
            return None
        return (Rows(self._shaped(rows.features), rows.lines) for rows in found)

    def read(self, path: str) -> Iterator[Rows]:
        """Yield the rows of a CSV file in chunks; DataError with line and column at a bad cell.

        Columns are found by their names if the training file had a header; others are ignored.
        The target is not read, and may be missing. For data without named columns, such as images,
        each row has the values of one sample, and may have the target as its last.
        """
        with reading(path, CSV.upper()):
            table = self._table or self._table_like(path)
            for found in table.read(path, with_target=False, may_drop=False):
                yield Rows(self._finish(table, found.features), found.lines)

    def _finish(self, table: Table, features: Array) -> Array:
        """Scale, fill and standardize features: (rows, features) float64."""
        x = aligned_empty(features.shape, self._dtype)
        if not self.arrays:
            table.scale(features, self._scale, out=x)
        else:
            scaled_features = table.scale(features, self._scale, out=np.empty(features.shape))
            self._statistics.apply(scaled_features, out=x)
        return self._shaped(x)

    def _shaped(self, x: Array) -> Array:
        return x if self._sample_shape is None else x.reshape(len(x), *self._sample_shape)

    def _table_like(self, path: str) -> Table:
        """Return the table of a file whose columns the config does not name."""
        spec = self._spec
        head = CSVFile(path, delimiter=spec.get("delimiter"), header=spec.get("header")).head
        choice = choice_of(spec)
        n_features = head.n_columns - 1
        if self._sample_shape is not None:
            n_features = math.prod(self._sample_shape)
        is_absent = head.n_columns == (spec.get("n_columns") or n_features + 1) - 1
        if isinstance(choice.target, str):
            is_absent = choice.target not in head.names
        if is_absent:
            choice = replace(choice, target=None)
        table = choose_columns(head, choice, missing=spec["missing"])
        table = with_encodings(table, encodings_of(spec), self._names)
        if len(table.feature_names) != n_features:
            raise ValueError(
                f"it has {head.n_columns} columns, but a sample has {n_features} values"
            )
        return table


def scale_of(section: Mapping[str, Any]) -> float:
    """Return the factor of a data section; x of a user's own source is as the source returns it."""
    name = section.get("name")
    if name not in registry.names("data"):
        return 1.0
    argument = registry.arguments(registry.resolve("data", name)).get("scale")
    if argument is None:
        return 1.0
    return float(section.get("scale", argument.default))


def choice_of(spec: Mapping[str, Any]) -> ColumnChoice:
    """Return the columns that a csv section chooses."""
    return ColumnChoice(
        target=spec["target"],
        columns=spec.get("columns"),
        exclude=spec.get("exclude"),
        categorical=spec.get("categorical"),
    )


def encodings_of(spec: Mapping[str, Any]) -> list[Encoding]:
    """Return the encodings that a csv section records; DataError if they are not such."""
    try:
        return [Encoding.model_validate(encoding) for encoding in spec.get("encodings") or ()]
    except ValidationError as error:
        raise DataError(
            "data.encodings: not valid; remove the key, and it is determined from the data"
        ) from error


def table_of(
    spec: Mapping[str, Any], class_names: Sequence[str] | None, head: Head | None = None
) -> Table | None:
    """Return the table that a resolved csv section describes.

    `head` is that of a file, which has the names of the columns if they are too long for a config:
    None if it is needed, or if an older version wrote the section.
    """
    if spec.get("n_columns") is None:
        return None
    if spec["names"] is not None or not spec["header"]:
        head = Head(
            spec["delimiter"], spec["header"], tuple(spec["names"] or ()), spec["n_columns"]
        )
    if head is None:
        return None
    table = choose_columns(head, choice_of(spec), missing=spec["missing"])
    return with_encodings(table, encodings_of(spec), class_names)


def _restore(statistics: Statistics, arrays: Mapping[str, Array]) -> None:
    try:
        statistics.restore(arrays)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"the checkpoint's preprocessing does not fit its config: {error}"
        ) from error


def _cell_text(value: object) -> str:
    return "" if value is None else str(value)
