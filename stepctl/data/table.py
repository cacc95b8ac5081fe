"""A table in a CSV file: which of its columns are features, which is the target, and its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from stepctl.data.columns import (
    CellError,
    Column,
    ColumnFacts,
    Encoding,
    Name,
    Role,
    label,
    merged,
)
from stepctl.data.csv_file import Block, CSVFile, Head, is_number
from stepctl.data.memory import scaled
from stepctl.data.statistics import Statistics
from stepctl.state.arena import Array
from stepctl.system.text import did_you_mean, in_one_line

Missing = Literal["error", "drop", "mean"]  # what happens to a row with a missing value

TARGET = -1  # the target among the numbers of columns
_INTEGERS = (np.dtype(np.int64), np.dtype(np.uint64))
_MAX_NAMES = 8192  # characters of all names that a config records, with ", " between them


class TableRows(NamedTuple):
    """Some consecutive rows.

    features: (rows, features) float64, NaN where a value is missing; target: (rows,) float64, labels
    or values, None if the file has no target; lines: (rows,) int64, where each row begins.
    """

    features: Array
    target: Array | None
    lines: npt.NDArray[np.int64]


@final
@dataclass(frozen=True)
class Table:
    """The columns of a table and how they are encoded.

    head: of the training file; its names are empty if they are too long for a config, and then the
    columns of a file are found by their positions. inputs: the columns of the features, at these `positions`
    in the training file. target: its column, at `target_position`.
    """

    head: Head
    inputs: tuple[Column, ...]
    positions: tuple[int, ...]
    target: Column | None
    target_position: int | None
    missing: Missing = "error"

    @property
    def feature_names(self) -> list[str]:
        """The names of the features, in the order of x."""
        return [name for column in self.inputs for name in column.feature_names]

    @property
    def is_number(self) -> list[bool]:
        """Which features are numbers, and not the encodings of words."""
        return [column.kind == "number" for column in self.inputs for _ in column.feature_names]

    @property
    def encodings(self) -> list[Encoding]:
        """The encodings of the columns that do not hold numbers."""
        columns = [*self.inputs]
        if self.target is not None:
            columns.append(self.target)
        found = []
        for column in columns:
            if column.kind != "number":
                categories = [*column.categories] if column.kind == "category" else []
                found.append(Encoding(column=column.name, kind=column.kind, categories=categories))
        return found

    def decided(self) -> dict[str, Any]:
        """Return the values that a run records in the data section of its config."""
        found: dict[str, Any] = {
            "header": self.head.header,
            "delimiter": self.head.delimiter,
            "names": [*self.head.names] or None,
            "n_columns": self.head.n_columns,
            "encodings": [encoding.model_dump() for encoding in self.encodings],
        }
        if self.target is not None and self.target.kind == "class":
            found["class_names"] = [*self.target.categories]
        return found

    @cached_property
    def _feature_columns(self) -> list[Column]:
        """The column of each feature."""
        return [column for column in self.inputs for _ in column.feature_names]

    def open(self, path: str) -> CSVFile:
        """Open a file of such rows; ValueError if it cannot be one."""
        return CSVFile(path, delimiter=self.head.delimiter, header=self.head.header)

    def read(
        self, path: str, *, with_target: bool = True, may_drop: bool = True
    ) -> Iterator[TableRows]:
        """Yield the rows of a file; ValueError, with line and column, if a cell does not fit.

        Without `with_target` the target is not read, and the file may lack it. Rows with missing values
        are dropped only if `may_drop`.
        """
        file = self.open(path)
        positions, target_position = self.positions_in(file.head, with_target=with_target)
        for block in file.blocks():
            rows = self._encode(block, file.head.n_columns, positions, target_position)
            rows = self.complete(rows, may_drop=may_drop)
            if len(rows.lines):
                yield rows

    def scale(self, features: Array, factor: float, *, out: Array) -> Array:
        """Write features, with the numbers times a factor, into `out`, and return it."""
        if factor == 1 or all(self.is_number):
            return scaled(features, factor, out=out)
        factors = np.where(self.is_number, factor, 1).astype(out.dtype)
        np.multiply(features, factors, out=out, casting="unsafe")
        return out

    def numbers(self, rows: Array) -> Array | None:
        """Return rows of numbers as features, (rows, features) float64.

        None if a column holds no numbers, or if there is another number of columns.
        """
        has_words = any(column.kind != "number" for column in self.inputs)
        if has_words or rows.shape[1:] != (len(self.inputs),):
            return None
        return rows.astype(np.float64)

    def encode_cells(self, rows: Sequence[Sequence[str]]) -> Array:
        """Return the features of rows of input cells: (rows, features) float64.

        CellError, which names the column, at the first cell that does not fit.
        """
        return np.concatenate(_encode_columns(rows, self.inputs, range(len(self.inputs))), axis=1)

    def positions_in(self, head: Head, *, with_target: bool) -> tuple[list[int], int | None]:
        """Return the positions of the inputs and of the target in a file.

        ValueError if it lacks one of these columns. Without `with_target` the position of the target is
        None, and the file may lack it.
        """
        if self.head.names:
            return self._positions_by_name(head.names, with_target=with_target)
        target = self.target_position
        positions = [*self.positions]
        if head.n_columns == self.head.n_columns:
            return positions, target if with_target else None
        if target is not None and not with_target and head.n_columns == self.head.n_columns - 1:
            return [position - (position > target) for position in positions], None
        raise ValueError(
            f"it has {head.n_columns} columns, but the run was trained on {self.head.n_columns}"
        )

    def _positions_by_name(
        self, names: Sequence[str], *, with_target: bool
    ) -> tuple[list[int], int | None]:
        target = None
        if self.target is not None and with_target:
            target = _find(str(self.target.name), names)
        return [_find(str(column.name), names) for column in self.inputs], target

    def _encode(
        self, block: Block, n_columns: int, positions: Sequence[int], target: int | None
    ) -> TableRows:
        columns = [*self.inputs]
        wanted = [*positions]
        if target is not None:
            assert self.target is not None
            columns.append(self.target)
            wanted.append(target)
        if all(column.kind == "number" for column in columns):
            numbers = _numbers(block, n_columns, wanted)
            if numbers is not None:
                y = None if target is None else numbers[:, -1]
                return TableRows(numbers[:, : len(positions)], y, block.lines)
        parts = _encode_block(block, n_columns, columns, wanted)
        y = None if target is None else parts.pop()[:, 0]
        return TableRows(np.concatenate(parts, axis=1), y, block.lines)

    def read_integers(self, path: str, columns: Sequence[int]) -> Array | None:
        """Return columns, numbers of the inputs or TARGET, as integers: (rows, columns).

        They are int64, or else uint64. None if a cell is no such integer, or is written as a float.
        """
        file = self.open(path)
        positions, target = self.positions_in(file.head, with_target=TARGET in columns)
        if target is not None:
            positions.append(target)  # at the end, as TARGET says
        wanted = [positions[column] for column in columns]
        for dtype in _INTEGERS:
            with contextlib.suppress(ValueError):
                return np.concatenate([block.numbers(wanted, dtype) for block in file.blocks()])
        return None

    def integer_rows(self, path: str) -> Iterator[TableRows] | None:
        """Return the rows of a file without the target, with integers as features.

        They are int64, or else uint64. None if an input is no such integer, or is written as a float.
        The file is read twice, in blocks.
        """
        file = self.open(path)
        positions, _ = self.positions_in(file.head, with_target=False)

        def rows(dtype: np.dtype[Any]) -> Iterator[TableRows]:
            for block in file.blocks():
                block.check_width(file.head.n_columns)
                yield TableRows(block.numbers(positions, dtype), None, block.lines)

        for dtype in _INTEGERS:
            with contextlib.suppress(ValueError):
                for _ in rows(dtype):
                    pass
                return rows(dtype)
        return None

    def complete(self, rows: TableRows, *, may_drop: bool, noun: str = "line") -> TableRows:
        """Return the rows without those that are dropped because a value is missing.

        ValueError, which begins with `noun` and the row's line, at a value that must be there.
        """
        missing = np.isnan(rows.features)
        target_missing = np.zeros(len(missing), np.bool_)
        if rows.target is not None:
            target_missing = np.isnan(rows.target)
        if self.missing == "mean":
            missing[:] = False
        incomplete = target_missing | missing.any(axis=1)
        if not incomplete.any():
            return rows
        if self.missing == "drop" and may_drop:
            kept = ~incomplete
            y = None if rows.target is None else rows.target[kept]
            return TableRows(rows.features[kept], y, rows.lines[kept])
        row = int(incomplete.argmax())
        if missing[row].any():
            where = label(self._feature_columns[int(missing[row].argmax())].name)
            remedy = "fix the row, or set data.missing to drop or mean"
            if not may_drop:
                remedy = "the run was trained without such rows; fix the row, or remove it"
        else:
            assert self.target is not None
            where = f"{label(self.target.name)}, the target,"
            remedy = "fix the row, or remove it"
            if may_drop:
                remedy = "fix the row, or set data.missing: drop"
        raise ValueError(f"{noun} {rows.lines[row]}: {where} has no value; {remedy}")


def _numbers(block: Block, n_columns: int, positions: Sequence[int]) -> Array | None:
    """Return columns of numbers: (rows, columns); None if a cell is not a number."""
    is_whole = sorted(positions) == [*range(n_columns)]
    try:
        if is_whole:
            numbers = block.numbers(None)
            if numbers.shape[1] != n_columns:
                return None
        else:
            block.check_width(n_columns)  # NumPy does not compare the rows if it reads some columns
            numbers = block.numbers(positions)
    except ValueError:
        return None
    if is_whole and [*positions] != [*range(n_columns)]:
        return numbers[:, positions]
    return numbers


def _encode_block(
    block: Block, n_columns: int, columns: Sequence[Column], positions: Sequence[int]
) -> list[Array]:
    """Return the features of each column; ValueError with the first line that does not fit."""
    block.check_width(n_columns)
    try:
        return _encode_columns(block.cells, columns, positions)
    except CellError as error:
        raise ValueError(f"line {block.lines[error.row]}: {error}") from error


def _encode_columns(
    rows: Sequence[Sequence[str]], columns: Sequence[Column], positions: Sequence[int]
) -> list[Array]:
    """Return the features of each column; CellError at the first row that does not fit."""
    parts = []
    errors = []
    for column, position in zip(columns, positions, strict=True):
        try:
            parts.append(column.encode([row[position] for row in rows]))
        except CellError as error:
            errors.append(CellError(error.row, f"{label(column.name)}: {error}"))
    if errors:
        raise min(errors, key=lambda error: error.row)
    return parts


@dataclass(frozen=True)
class ColumnChoice:
    """The columns that a config chooses, by name or number; None is the default."""

    target: Name | None = -1
    columns: Sequence[Name] | None = None
    exclude: Sequence[Name] | None = None
    categorical: Sequence[Name] | None = None

    @property
    def has_names(self) -> bool:
        """Whether a column is chosen by its name, so that there must be a header."""
        chosen = [
            self.target,
            *(self.columns or ()),
            *(self.exclude or ()),
            *(self.categorical or ()),
        ]
        return any(isinstance(name, str) for name in chosen)

    def position(self, key: str, name: Name, head: Head) -> int:
        """Return the position of a column, which the config's `key` names; ValueError."""
        n_columns = head.n_columns
        if isinstance(name, int):
            if not -n_columns <= name < n_columns:
                raise ValueError(
                    f"it has no column {name}: its {n_columns} columns are numbered from 0"
                )
            return name % n_columns
        if not head.header:
            raise ValueError(
                f"data.{key} is the name {name!r}, but data.header is false; set it to true"
            )
        if name not in head.names and any(map(is_number, head.names)):
            raise ValueError(
                f"data.{key} is the name {name!r}, but the first line holds numbers, not names; give "
                "the number of the column"
            )
        return _find(name, head.names)

    def positions(self, key: str, head: Head) -> list[int]:
        """Return the positions of the columns in a list of the config; [] without one."""
        return [self.position(key, name, head) for name in getattr(self, key) or ()]


def _find(name: str, names: Sequence[str]) -> int:
    if name not in names:
        found = in_one_line(", ".join(names), 200) or "none"
        raise ValueError(f"it has no column {name!r}{did_you_mean(name, [*names])}; found: {found}")
    return names.index(name)


def choose_columns(head: Head, choice: ColumnChoice, *, missing: Missing) -> Table:
    """Return the table of a file, as if all of its columns held numbers."""
    names: list[Name] = [*head.names] or [*range(head.n_columns)]
    target = None
    if choice.target is not None:
        target = choice.position("target", choice.target, head)
    inputs = choice.positions("columns", head)
    if target is not None and target in inputs:
        raise ValueError(f"data.columns has {names[target]!r}, which is the target; leave it out")
    if choice.columns is None:
        inputs = [position for position in range(head.n_columns) if position != target]
    excluded = {*choice.positions("exclude", head)}
    inputs = [position for position in dict.fromkeys(inputs) if position not in excluded]
    if not inputs:
        raise ValueError("it has no column of features; at least one is needed")
    if len(", ".join(head.names)) > _MAX_NAMES:
        head = head._replace(names=())
    return Table(
        head=head,
        inputs=tuple(Column(names[position]) for position in inputs),
        positions=tuple(inputs),
        target=None if target is None else Column(names[target]),
        target_position=target,
        missing=missing,
    )


def detect_kinds(table: Table, file: CSVFile, choice: ColumnChoice, *, has_classes: bool) -> Table:
    """Read all cells of a file, and return the table with the kind and categories of each column.

    `has_classes`: words in the target are the names of classes. ValueError if the cells of a column
    have no common kind.
    """
    listed = {*choice.positions("categorical", file.head)}
    positions, target = table.positions_in(file.head, with_target=True)
    delimiter = file.head.delimiter
    facts = [
        ColumnFacts(column.name, is_listed=position in listed, delimiter=delimiter)
        for column, position in zip(table.inputs, positions, strict=True)
    ]
    if table.target is not None:
        assert target is not None
        role: Role = "class" if has_classes else "value"
        is_listed = target in listed
        facts.append(
            ColumnFacts(table.target.name, role=role, is_listed=is_listed, delimiter=delimiter)
        )
        positions.append(target)
    for block in file.blocks():
        block.check_width(file.head.n_columns)
        for fact, position in zip(facts, positions, strict=True):
            fact.add(block.lines, [row[position] for row in block.cells])
    columns = [fact.column(may_have_header=file.may_have_header) for fact in facts]
    target_column = columns.pop() if table.target is not None else None
    return replace(table, inputs=tuple(columns), target=target_column)


def with_categories_of(table: Table, other: Table) -> Table:
    """Return the table with the categories and classes of another one too."""
    inputs = [
        merged(column, found) for column, found in zip(table.inputs, other.inputs, strict=True)
    ]
    target = table.target
    if target is not None and other.target is not None:
        target = merged(target, other.target)
    return replace(table, inputs=tuple(inputs), target=target)


def statistics_of(table: Table, *, standardize: bool) -> Statistics:
    """Return the statistics that a table's features need; they are not computed yet."""
    return Statistics(
        table.feature_names,
        is_number=table.is_number,
        fill=table.missing == "mean",
        standardize=standardize,
    )


def with_encodings(
    table: Table, encodings: Sequence[Encoding], class_names: Sequence[str] | None
) -> Table:
    """Return the table with the encodings that a config records."""
    by_name = {encoding.column: encoding for encoding in encodings}

    def encoded(column: Column) -> Column:
        encoding = by_name.get(column.name)
        if encoding is None:
            return column
        categories: Sequence[str] = encoding.categories
        if encoding.kind == "class":
            categories = class_names or ()
        return Column(column.name, encoding.kind, tuple(categories))

    target = None if table.target is None else encoded(table.target)
    return replace(table, inputs=tuple(map(encoded, table.inputs)), target=target)
