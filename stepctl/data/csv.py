"""Comma-separated values, gzipped or not: numbers, words and truth values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, final

import numpy as np
from pydantic import Field

from stepctl.config.registry import DECIDED, File
from stepctl.data.base import Source, Sources, Targets
from stepctl.data.columns import Name
from stepctl.data.csv_file import CSVFile, expected_rows
from stepctl.data.files import reading
from stepctl.data.integers import RoundedIntegers
from stepctl.data.memory import InMemory
from stepctl.data.preprocessing import choice_of, table_of
from stepctl.data.statistics import Statistics
from stepctl.data.table import (
    TARGET,
    Missing,
    Table,
    choose_columns,
    detect_kinds,
    statistics_of,
    with_categories_of,
)
from stepctl.data.table_source import TableSource
from stepctl.errors import DataError
from stepctl.state.arena import Array, aligned_empty
from stepctl.system.text import in_one_line

_ALWAYS_EXACT = 1 << 24  # every float dtype of a run keeps the integers up to here


def csv(
    *,
    path: File,
    validation_path: File | None = None,
    target: int | str | None = -1,
    header: Annotated[bool | None, DECIDED] = None,
    delimiter: Annotated[Annotated[str, Field(min_length=1, max_length=1)] | None, DECIDED] = None,
    scale: float = 1.0,
    columns: list[Name] | None = None,
    exclude: list[Name] | None = None,
    categorical: list[Name] | None = None,
    missing: Missing = "error",
    standardize: bool = False,
    names: Annotated[list[str] | None, DECIDED] = None,
    n_columns: Annotated[int | None, DECIDED] = None,
    encodings: Annotated[list[dict[str, Any]] | None, DECIDED] = None,
    class_names: list[str] | None = None,
    targets: Targets,
    dtype: str,
    integer_inputs: bool = False,
    needs_targets: bool = True,
) -> Sources:
    """The rows of a CSV file: column `target` is y, all others are x.

    Words become one-hot features, truth values 0 and 1, and words in the target the names of classes.

    Args:
        path: The CSV file of the training samples.
        validation_path: The CSV file of the validation samples; by default there is none.
        target: Column of the target: its name, or its number from 0 (-1 is the last); null for data
            without targets.
        header: Whether the first line holds the names of the columns. By default it does if a column
            is chosen by its name, or if it has no number and a word of it is above numbers.
        delimiter: The character between two values; by default it is found in the first lines.
        scale: Factor that the numbers among the features are multiplied by.
        columns: The columns of the features, by name or number; by default all but the target.
        exclude: Columns that are left out.
        categorical: Columns whose values are categories though they may look like numbers or dates, or
            are more than 100 (at most 1,000).
        missing: What to do with a missing value (an empty one, NA, N/A, NaN, null or ?): refuse it
            (error), drop its row, or replace it by the feature's mean over the training samples.
        standardize: Subtract the mean of the training samples from each number among the features,
            and divide by their standard deviation. Both are kept in the state.
        names: The names of the columns. It is recorded when the run starts, as are the next two keys.
        n_columns: Number of columns of the file.
        encodings: How the columns that hold no numbers are encoded.
    """
    if target is None and needs_targets:
        raise DataError("data.target: is null, but the task learns from the targets; name it")
    spec = {
        "target": target,
        "header": header,
        "delimiter": delimiter,
        "columns": columns,
        "exclude": exclude,
        "categorical": categorical,
        "missing": missing,
        "names": names,
        "n_columns": n_columns,
        "encodings": encodings,
    }
    paths = [path] if validation_path is None else [path, validation_path]
    table = table_of(spec, class_names)
    if table is None and n_columns is not None:
        with reading(path, "CSV"):
            head = CSVFile(path, delimiter=delimiter, header=header).head
        table = table_of(spec, class_names, head)
    loader = _Loader(
        scale=scale,
        standardize=standardize,
        targets=targets,
        dtype=dtype,
        integer_inputs=integer_inputs,
    )
    if table is None:
        table, loaded = _detect(paths, spec, class_names, loader)
    else:
        loaded = [loader.load(file, table) for file in paths]
    statistics = statistics_of(table, standardize=standardize)
    sources = [loader.source(each, table, statistics) for each in loaded]
    return Sources(*sources)


def _detect(
    paths: Sequence[str],
    spec: dict[str, Any],
    class_names: Sequence[str] | None,
    loader: _Loader,
) -> tuple[Table, list[_Loaded]]:
    """Return the table of the files, whose columns' kinds are found in their cells, and their rows."""
    choice = choice_of(spec)
    header = spec["header"]
    if header is None and choice.has_names:
        header = True
    with reading(paths[0], "CSV"):
        head = CSVFile(paths[0], delimiter=spec["delimiter"], header=header).head
        numeric = choose_columns(head, choice, missing=spec["missing"])
    failure = None
    if not choice.categorical:  # otherwise there are words
        try:
            return numeric, [loader.load(path, numeric) for path in paths]
        except DataError as error:
            failure = error
    found = []
    for path in paths:
        with reading(path, "CSV"):
            has_classes = loader.targets == "classes"
            found.append(detect_kinds(numeric, numeric.open(path), choice, has_classes=has_classes))
    table = found[0]
    for other in found[1:]:
        table = with_categories_of(table, other)
    if table == numeric and failure is not None:
        raise failure
    target = table.target
    if class_names is not None and target is not None and target.kind == "class":
        table = replace(table, target=replace(target, categories=tuple(class_names)))
    return table, [loader.load(path, table) for path in paths]


class _Loaded(NamedTuple):
    """The rows of a file, scaled, and the largest magnitude in each column, if it is large.

    features: (rows, features); target: (rows,) float64, if there is one.
    """

    path: str
    features: Array
    target: Array | None
    largest: Array
    largest_target: float

    def integers(self, table: Table, columns: Sequence[int]) -> Array | None:
        """Return columns of the table, see `Table.read_integers`; None unless all are integers."""
        with reading(self.path, "CSV"):
            integers = table.read_integers(self.path, columns)
        if integers is None or len(integers) != len(self.features):
            return None
        return integers


@final
@dataclass(frozen=True)
class _Loader:
    """Loads the rows of a table."""

    scale: float
    standardize: bool
    targets: Targets
    dtype: str
    integer_inputs: bool

    def load(self, path: str, table: Table) -> _Loaded:
        """Read all rows of a file."""
        # numbers that are filled or standardized stay as exact as they are in the file
        keeps_float64 = self.standardize or table.missing == "mean"
        dtype = np.dtype(np.float64 if keeps_float64 else self.dtype)
        buffer: _RowBuffer | None = None
        targets = []
        largest = np.zeros(len(table.feature_names))
        largest_target = 0.0
        with reading(path, "CSV"):
            for rows in table.read(path):
                features = rows.features
                if features.max() > _ALWAYS_EXACT or features.min() < -_ALWAYS_EXACT:
                    np.maximum(largest, np.abs(features).max(axis=0), out=largest)
                if buffer is None:
                    n_expected = expected_rows(path, len(features))
                    buffer = _RowBuffer(n_expected, features.shape[1], dtype)
                table.scale(features, self.scale, out=buffer.append(len(features)))
                if rows.target is not None:
                    largest_target = max(largest_target, float(np.abs(rows.target).max()))
                    targets.append(rows.target.copy())
            if buffer is None:
                raise ValueError(
                    "each of its rows lacks a value; exclude the column that has none, or set "
                    "data.missing: mean"
                )
        target = np.concatenate(targets) if targets else None
        return _Loaded(path, buffer.rows, target, largest, largest_target)

    def source(self, loaded: _Loaded, table: Table, statistics: Statistics) -> Source:
        """Return the source of the rows of a file."""

        def place(row: int) -> str:
            return f"line {_line_of(row, loaded.path, table)}"

        x = None
        if self.integer_inputs and self.scale == 1 and not statistics.arrays:
            x = loaded.integers(table, range(len(table.inputs)))
        y = loaded.target
        rounded = RoundedIntegers(np.dtype(self.dtype), np.dtype(self.dtype))
        if self.scale == 1 and x is None and not statistics.arrays:
            self._find_rounded(loaded, table, rounded, place)
        if y is not None and self.targets != "classes":
            is_large = loaded.largest_target > _ALWAYS_EXACT
            integers = None
            if is_large or self.targets == "any":
                integers = loaded.integers(table, [TARGET])
            if integers is not None and self.targets == "any":
                y = integers[:, 0]
            elif integers is not None:
                rounded.add(loaded.path, place, "y", 0, integers)
        if x is not None:
            return InMemory(
                x,
                y,
                origin=loaded.path,
                targets=self.targets,
                dtype=self.dtype,
                integer_inputs=True,
                place=place,
                warnings=rounded.warnings(),
                decided=table.decided(),
            )
        return TableSource(
            loaded.features,
            y,
            decided=table.decided(),
            origin=loaded.path,
            targets=self.targets,
            dtype=self.dtype,
            statistics=statistics,
            place=place,
            warnings=rounded.warnings(),
        )

    @staticmethod
    def _find_rounded(
        loaded: _Loaded, table: Table, rounded: RoundedIntegers, place: Callable[[int], str]
    ) -> None:
        """Add to `rounded` the columns whose values are written as integers, and are large."""
        feature = 0
        for number, column in enumerate(table.inputs):
            if loaded.largest[feature] > _ALWAYS_EXACT:
                integers = loaded.integers(table, [number])
                if integers is not None:
                    rounded.add(loaded.path, place, "x", 0, integers)
            feature += len(column.feature_names)


@final
class _RowBuffer:
    """An array of rows that grows. Memory that is never written is not allocated by the system."""

    def __init__(self, n_expected: int, width: int, dtype: np.dtype[Any]) -> None:
        self._array = aligned_empty((n_expected, width), dtype)
        self._n_rows = 0

    @property
    def rows(self) -> Array:
        """The rows that were appended."""
        return self._array[: self._n_rows]

    def append(self, n_rows: int) -> Array:
        """Append rows that are not initialized, and return them."""
        first = self._n_rows
        self._n_rows += n_rows
        if self._n_rows > len(self._array):
            grown = aligned_empty(
                (self._n_rows + self._n_rows // 2, self._array.shape[1]), self._array.dtype
            )
            grown[:first] = self._array[:first]
            self._array = grown
        return self._array[first : self._n_rows]


def _line_of(row: int, path: str, table: Table) -> int:
    """Return the line of the file on which a row begins; used only for a message."""
    with reading(path, "CSV"):
        for rows in table.read(path):
            if row < len(rows.lines):
                return int(rows.lines[row])
            row -= len(rows.lines)
    raise DataError(f"{in_one_line(path)}: changed while it was read; run the command again")
