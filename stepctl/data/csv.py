"""Comma-separated numbers, gzipped or not."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable
from csv import Error, reader
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stepctl.config.registry import File
from stepctl.data.base import Sources, Targets
from stepctl.data.files import read_unpacked, reading
from stepctl.data.integers import RoundedIntegers, is_integer
from stepctl.data.memory import InMemory
from stepctl.errors import DataError
from stepctl.state.arena import Array
from stepctl.system.files import open_regular
from stepctl.system.text import in_one_line

_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
_ALWAYS_EXACT = 1 << 24  # every float dtype of a run keeps the integers up to here
# delimiters to suggest, and their spelling in a double-quoted YAML string
_DELIMITERS = {",": ",", ";": ";", "\t": "\\t", "|": "|"}


def csv(
    *,
    path: File,
    validation_path: File | None = None,
    target: int | str | None = -1,
    header: bool = False,
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    scale: float = 1.0,
    targets: Targets,
    dtype: str,
    integer_inputs: bool = False,
    needs_targets: bool = True,
) -> Sources:
    """The rows of a CSV file: column `target` is y, all others are x.

    Args:
        path: The CSV file of the training samples.
        validation_path: The CSV file of the validation samples; by default there is none.
        target: Column of the target: its number from 0 (-1 is the last), or with `header` its name;
            null for data without targets.
        header: Whether the first line holds the names of the columns.
        delimiter: The character between two values.
        scale: Factor that the samples are multiplied by.
    """

    if target is None and needs_targets:
        raise DataError("data.target: is null, but the task learns from the targets; name it")

    def load(file: str) -> InMemory:
        with reading(file, "CSV"):
            with open_regular(file) as opened:
                text = _decode(read_unpacked(opened))
            table = _parse_table(text, header, delimiter)
            inputs = [*range(table.numbers.shape[1])]
            outputs = []
            if target is not None:
                outputs = [_column(target, table.names, len(inputs))]
                inputs.remove(outputs[0] % len(inputs))

        def place(row: int) -> str:
            return f"line {_line_of(file, row, header, delimiter)}"

        if integer_inputs and scale == 1:
            x = table.as_stored(inputs)
        else:
            x = table.numbers[:, inputs]
        y = None
        if outputs:
            y = table.as_stored(outputs) if targets == "any" else table.numbers[:, outputs]
            y = y[:, 0]
        rounded = RoundedIntegers(np.dtype(dtype), np.dtype(dtype))
        if scale == 1 and not is_integer(x.dtype):
            table.find_rounded(inputs, rounded, file, place, "x")
        if y is not None and targets != "classes" and not is_integer(y.dtype):
            table.find_rounded(outputs, rounded, file, place, "y")
        return InMemory(
            x,
            y,
            origin=file,
            targets=targets,
            dtype=dtype,
            scale=scale,
            integer_inputs=integer_inputs,
            place=place,
            warnings=rounded.warnings(),
        )

    validation = load(validation_path) if validation_path else None
    return Sources(load(path), validation)


def _line_of(file: str, row: int, header: bool, delimiter: str) -> int:
    """Return the line of the file on which a row of numbers begins; used only for a message."""
    with open_regular(file) as opened:
        text = _decode(read_unpacked(opened))
    lines = reader(io.StringIO(text, newline=""), delimiter=delimiter)
    wanted = row + 1 if header else row
    number = 0
    line = 1
    for values in lines:
        if values:
            if number == wanted:
                return line
            number += 1
        line = lines.line_num + 1
    return line


def _decode(data: bytes) -> str:
    """Return the text with "\\n" at the end of each line; ValueError if it is not UTF-8."""
    if data.startswith(_BYTE_ORDER_MARKS) or b"\0" in data[:1000]:
        raise ValueError(
            "it is not UTF-8, but looks like UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"line {line}: it is not UTF-8 (byte 0x{data[error.start]:02x}); if it is Latin-1, convert it with: "
            "iconv -f LATIN1 -t UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class _Table:
    """The rows of a file; `names` of the columns is [] without a header.

    numbers: (rows, columns). They were parsed from the text after its first `start` characters.
    """

    names: list[str]
    numbers: npt.NDArray[np.float64]
    text: str
    start: int
    delimiter: str

    def as_stored(self, columns: list[int]) -> Array:
        """Return columns as int64 if all their values are written as integers, or as floats."""
        numbers = self.numbers[:, columns]
        if not np.array_equal(numbers, np.rint(numbers)):
            return numbers
        integers = self._as_integers(columns)
        return numbers if integers is None else integers

    def find_rounded(
        self,
        columns: list[int],
        rounded: RoundedIntegers,
        origin: str,
        place: Callable[[int], str],
        name: str,
    ) -> None:
        """Add to `rounded` the columns whose values are written as integers, and are large."""
        for column in columns:
            numbers = self.numbers[:, column]
            is_large = float(np.abs(numbers).max()) > _ALWAYS_EXACT
            if is_large and np.array_equal(numbers, np.rint(numbers)):
                integers = self._as_integers([column])
                if integers is not None:
                    rounded.add(origin, place, name, 0, integers)

    def _as_integers(self, columns: list[int]) -> npt.NDArray[np.int64] | None:
        """Return columns as int64; None if a value is written as a float, or is too large."""
        file = io.StringIO(self.text)
        file.seek(self.start)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # NumPy warns about an integer written as a float
                return np.loadtxt(
                    file,
                    np.int64,
                    delimiter=self.delimiter,
                    usecols=columns,
                    ndmin=2,
                    comments=None,
                    quotechar='"',
                )
        except (ValueError, OverflowError, DeprecationWarning):
            return None


def _parse_table(text: str, header: bool, delimiter: str) -> _Table:
    """Return the table in a text; ValueError if there is none."""
    names: list[str] = []
    file = io.StringIO(text)
    if header:
        names = _read_header(file, delimiter)
    start = file.tell()
    if not text[start:].strip():
        raise ValueError("it holds no rows")
    try:
        table = np.loadtxt(file, delimiter=delimiter, ndmin=2, comments=None, quotechar='"')
    except ValueError as error:
        problem = _explain(text, header, delimiter)
        raise ValueError(problem or str(error).partition(";")[0]) from error
    if table.shape[1] == 1:
        suggestion = _other_delimiter(text, delimiter)
        if suggestion:
            raise ValueError(suggestion)
    if names and len(names) != table.shape[1]:
        raise ValueError(
            f"its header names {len(names)} columns, but its rows have {table.shape[1]}"
        )
    return _Table(names, table, text, start, delimiter)


def _read_header(file: io.StringIO, delimiter: str) -> list[str]:
    """Return the column names, and leave the file after them; quoted names may span lines."""
    rows = reader(iter(file.readline, ""), delimiter=delimiter)
    try:
        first_row = next((row for row in rows if row), [])
    except Error as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    names = [name.strip() for name in first_row]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"its header names {repeated[0]!r} more than once; rename one: a copy of the target among the "
            "features would leak it"
        )
    return names


def _explain(text: str, header: bool, delimiter: str) -> str | None:
    """Return the line and the problem of the first bad row; None if every row is good."""
    lines = reader(io.StringIO(text, newline=""), delimiter=delimiter)
    n_columns: int | None = None
    first = True
    next_line = 1
    try:
        for row in lines:
            line = next_line
            next_line = lines.line_num + 1
            if not row:
                continue
            if first and header:
                first = False
                continue
            problem = _row_problem(row, n_columns)
            if problem is not None:
                return f"line {line}: {problem}{_hint(text, row, delimiter, first=first)}"
            n_columns = len(row)
            first = False
    except Error as error:
        return f"line {next_line}: {error}"
    return None


def _row_problem(row: list[str], n_columns: int | None) -> str | None:
    for number, value in enumerate(row, 1):
        if not _is_number(value):
            return f"column {number}: {in_one_line(repr(value), 60)} is not a number"
    if n_columns is not None and len(row) != n_columns:
        return f"{len(row)} columns, but {n_columns} in the rows before"
    return None


def _hint(text: str, row: list[str], delimiter: str, *, first: bool) -> str:
    suggestion = _other_delimiter(text, delimiter)
    if suggestion:
        return f"; {suggestion}"
    # a row of names holds no number and no empty value
    if first and all(value.strip() and not _is_number(value) for value in row):
        return "; if the first line holds names, set data.header: true"
    return ""


def _other_delimiter(text: str, delimiter: str) -> str | None:
    """Suggest a delimiter that splits all lines evenly, if the first line lacks the given one."""
    lines = [line for line in text.split("\n", 10)[:10] if line.strip()]
    if any(delimiter in line for line in lines[:1]):
        return None
    for other, spelled in _DELIMITERS.items():
        counts = {line.count(other) for line in lines}
        if len(counts) == 1 and counts != {0}:
            return f'the delimiter seems to be {other!r}: set data.delimiter: "{spelled}"'
    return None


def _is_number(value: str) -> bool:
    if "_" in value:  # accepted by float, but not by NumPy
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _column(target: int | str, names: list[str], n_columns: int) -> int:
    if isinstance(target, int):
        if not -n_columns <= target < n_columns:
            raise ValueError(
                f"it has no column {target}: its {n_columns} columns are numbered from 0"
            )
        return target
    if not names:
        raise ValueError(
            f"data.target is the name {target!r}, but data.header is false; set it to true"
        )
    if target not in names:
        raise ValueError(f"it has no column {target!r}; found: {', '.join(names)}")
    return names.index(target)
