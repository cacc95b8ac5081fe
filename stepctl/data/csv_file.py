"""Reading a CSV file in blocks of whole rows, so that it may be larger than memory.

file = CSVFile("iris.csv", delimiter=None, header=None)
file.head.names                 # ("sepal_length", ..., "species")
for block in file.blocks():
    block.numbers(None)         # (rows, columns) float64; ValueError if a cell is not a number
    block.cells                 # the same rows as lists of texts
    block.lines                 # the line of the file on which each row begins
"""

from __future__ import annotations

import itertools
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from csv import Error, reader
from functools import cached_property
from io import TextIOWrapper
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from stepctl.data.files import open_unpacked, read_unpacked
from stepctl.data.number_formats import formatted_number
from stepctl.state.arena import Array
from stepctl.system.files import open_regular

_BLOCK_CHARACTERS = 1 << 20  # of text, parsed at a time
_BLOCK_ROWS = 1 << 12  # of a file with quotes
_HEAD_ROWS = 100  # looked at to find the header
_HEAD_LINES = 10  # looked at to find the delimiter
_HEAD_BYTES = 1000
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
_ARCHIVE = "a zip archive or an Excel file, not a CSV; save it as CSV"
_COMPRESSED = "compressed, but not with gzip; unpack it"
_BINARY = "a binary file, not a CSV; save it as CSV"
_FORMATS = {  # by the first bytes
    b"PK\x03\x04": _ARCHIVE,
    b"PK\x05\x06": _ARCHIVE,
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an Excel file, not a CSV; save it as CSV",
    b"BZh91AY&SY": _COMPRESSED,
    b"\xfd7zXZ\0": _COMPRESSED,
    b"\x28\xb5\x2f\xfd": _COMPRESSED,
    b"PAR1\x15": "a Parquet file, not a CSV; save it as CSV",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, not a CSV; read it with data.name: hdf5",
    b"\x93NUMPY": "a file of NumPy, not a CSV; save it as CSV",
}
_DELIMITERS = (",", ";", "\t", "|")
_SPELLED = {"\t": "\\t"}  # in a double-quoted YAML string
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "?"})
# without "_" and the digits of other scripts, which Python's float accepts, and NumPy does not
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|infinity|nan)", re.ASCII)


def is_number(cell: str) -> bool:
    """Return whether a cell is a number, as "nan" and "inf" are."""
    return _NUMBER.fullmatch(cell.strip().lower()) is not None


def is_missing(cell: str) -> bool:
    """Return whether a cell has no value: empty, NA, N/A, NaN, null or ? in any case."""
    return cell.strip().lower() in _MISSING


class Block(ABC):
    """Some consecutive rows of a file.

    lines: (rows,) int64, the line on which each row begins.
    """

    lines: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    @abstractmethod
    def cells(self) -> list[list[str]]:
        """The cells of each row."""

    @abstractmethod
    def numbers(self, columns: Sequence[int] | None, dtype: npt.DTypeLike = np.float64) -> Array:
        """Return these columns (None: all) as numbers: (rows, columns).

        ValueError if a cell is not a number. With an integer dtype also if a cell is written as a
        float, or is too large.
        """

    def check_width(self, n_columns: int) -> None:
        """Raise ValueError at the first row that has another number of columns."""
        for line, row in zip(self.lines, self.cells, strict=True):
            if len(row) != n_columns:
                raise ValueError(
                    f"line {line}: {len(row)} columns, but {n_columns} in the rows before"
                )


@final
class TextBlock(Block):
    """Rows as text, one a line, without quotes. They are parsed by NumPy if all are numbers."""

    def __init__(self, text: list[str], lines: npt.NDArray[np.int64], delimiter: str) -> None:
        self.lines = lines
        self._text = text
        self._delimiter = delimiter

    @cached_property
    def cells(self) -> list[list[str]]:
        return [*_parsed(reader(self._text, delimiter=self._delimiter), int(self.lines[0]))]

    def numbers(self, columns: Sequence[int] | None, dtype: npt.DTypeLike = np.float64) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy warns about an integer written as a float
            try:
                return np.loadtxt(
                    self._text,
                    dtype,
                    delimiter=self._delimiter,
                    usecols=columns,
                    ndmin=2,
                    comments=None,
                )
            except (OverflowError, DeprecationWarning) as error:
                raise ValueError(str(error)) from error

    def check_width(self, n_columns: int) -> None:
        delimiter = self._delimiter
        wanted = n_columns - 1
        if not all(line.count(delimiter) == wanted for line in self._text):
            super().check_width(n_columns)


@final
class CellBlock(Block):
    """Rows that are parsed already, because they may span several lines."""

    def __init__(self, cells: list[list[str]], lines: npt.NDArray[np.int64]) -> None:
        self.lines = lines
        self._cells = cells

    @property
    def cells(self) -> list[list[str]]:
        return self._cells

    def numbers(self, columns: Sequence[int] | None, dtype: npt.DTypeLike = np.float64) -> Array:
        rows = self._cells
        if columns is not None:
            rows = [[row[column] for column in columns] for row in rows]
        if "_" in "".join(itertools.chain.from_iterable(rows)):
            raise ValueError("a cell has an underscore")
        convert: Any = int
        if np.dtype(dtype).kind == "f":
            convert = float
        try:
            return np.array([[convert(cell) for cell in row] for row in rows], dtype)
        except OverflowError as error:
            raise ValueError(str(error)) from error


class _Open(NamedTuple):
    """An open file after its header: its text, and the number of the next line."""

    text: TextIOWrapper
    line: int


class Head(NamedTuple):
    """The format of a file, found in its first lines: delimiter, header, number of columns.

    names: the names of the columns; empty without a header, or if they are not known.
    """

    delimiter: str
    header: bool
    names: tuple[str, ...]
    n_columns: int


@final
class CSVFile:
    """A CSV file, gzipped or not. Methods raise ValueError, with the line, if it is malformed.

    `delimiter` and `header` are detected if they are None. A first line is a header if it has no
    number, and one of its words is above a column of numbers, or if there is no other line.
    """

    def __init__(
        self, path: str, *, delimiter: str | None = None, header: bool | None = None
    ) -> None:
        self.path = path
        with self._decoded() as text:
            lines = [*itertools.islice(filter(str.strip, text), _HEAD_LINES)]
        if not lines:
            raise ValueError("it holds no rows")
        detected = _find_delimiter(lines)
        if delimiter is None:
            delimiter = detected
        elif delimiter not in lines[0] and detected in lines[0]:
            raise ValueError(
                f"the delimiter seems to be {detected!r}, not {delimiter!r}: write the file with "
                f'{delimiter!r}, or set data.delimiter: "{_SPELLED.get(detected, detected)}"'
            )
        self._delimiter = delimiter
        with self._decoded() as text:
            rows = _parsed(reader(text, delimiter=delimiter), 1)
            first_rows = [*itertools.islice(filter(None, rows), _HEAD_ROWS)]
        if header is None:
            header = _is_header(first_rows)
        names = _column_names(first_rows.pop(0)) if header else []
        if not first_rows:
            raise ValueError("it holds no rows")
        n_columns = len(first_rows[0])
        if header and len(names) != n_columns:
            raise ValueError(
                f"its header names {len(names)} columns, but its rows have {n_columns}"
            )
        self.head = Head(delimiter, header, tuple(names), n_columns)
        # whether the first row, which was not taken for a header, may be one
        self.may_have_header = not header and _has_only_words(first_rows[0])

    def blocks(self) -> Iterator[Block]:
        """Yield all rows, in blocks that fit in memory."""
        with self._rows() as (text, line):
            while lines := text.readlines(_BLOCK_CHARACTERS):
                if '"' in "".join(lines):
                    yield from self._cell_blocks(itertools.chain(lines, text), line)
                    return
                numbers = np.arange(line, line + len(lines))
                line += len(lines)
                if "\n" in lines:
                    numbers = numbers[[row != "\n" for row in lines]]
                    lines = [row for row in lines if row != "\n"]
                if lines:
                    yield TextBlock(lines, numbers, self._delimiter)

    def _cell_blocks(self, lines: Iterable[str], line: int) -> Iterator[Block]:
        """Yield the rows of lines that may have quotes; `line` is the number of the first."""
        before = line - 1
        rows = reader(lines, delimiter=self._delimiter)
        cells: list[list[str]] = []
        numbers: list[int] = []
        for row in _parsed(rows, line):
            if row:
                cells.append(row)
                numbers.append(line)
            line = before + rows.line_num + 1
            if len(cells) == _BLOCK_ROWS:
                yield CellBlock(cells, np.array(numbers))
                cells = []
                numbers = []
        if cells:
            yield CellBlock(cells, np.array(numbers))

    @contextmanager
    def _rows(self) -> Iterator[_Open]:
        """Open the file after its header."""
        with self._decoded() as text:
            line = 1
            if self.head.header:
                rows = reader(iter(text.readline, ""), delimiter=self._delimiter)
                next(filter(None, rows))
                line = rows.line_num + 1
            yield _Open(text, line)

    @contextmanager
    def _decoded(self) -> Iterator[TextIOWrapper]:
        """Open the file as text with "\\n" at the end of each line; ValueError if it is not UTF-8."""
        with open_regular(self.path) as file, open_unpacked(file) as unpacked:
            head = unpacked.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            _refuse_binary(head)
            try:
                with TextIOWrapper(unpacked, "utf-8-sig") as text:
                    yield text
            except UnicodeDecodeError as error:
                raise ValueError(self._undecodable()) from error

    def _undecodable(self) -> str:
        with open_regular(self.path) as file:
            data = read_unpacked(file)
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line = 1 + data.count(b"\n", 0, error.start)
            return (
                f"line {line}: it is not UTF-8 (byte 0x{data[error.start]:02x}); if it is Latin-1, "
                "convert it with: iconv -f LATIN1 -t UTF-8"
            )
        return "it changed while it was read"


def _refuse_binary(head: bytes) -> None:
    """Raise ValueError if a file that begins with these bytes is no text, or is UTF-16."""
    for start, what in _FORMATS.items():
        if head.startswith(start):
            raise ValueError(f"it is {what}")
    if not head.startswith(_BYTE_ORDER_MARKS):
        n_zeros = head.count(0)
        if not n_zeros:
            return
        # in UTF-16, ASCII characters have a zero as their first byte, or as their second
        is_even = head[1::2].count(0) == 0 or head[::2].count(0) == 0
        if not is_even or n_zeros < len(head) / 10:
            raise ValueError(f"it is {_BINARY}")
    raise ValueError(
        "it is not UTF-8, but looks like UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"
    )


def expected_rows(path: str, n_first: int) -> int:
    """Estimate the number of rows of a file from those of its first block, rounded up.

    The estimate is too low for a gzipped file.
    """
    n_blocks = max(1.0, 1.05 * os.stat(path).st_size / _BLOCK_CHARACTERS)
    return math.ceil(n_first * n_blocks)


def _parsed(rows: Any, first_line: int) -> Iterator[list[str]]:
    """Yield the rows of a csv.reader; ValueError with the line if one cannot be parsed."""
    try:
        yield from rows
    except Error as error:
        raise ValueError(f"line {first_line + rows.line_num - 1}: {error}") from error


def _find_delimiter(lines: Sequence[str]) -> str:
    """Return the delimiter: "," if the first line has one, else one that all rows have evenly.

    A comma is none if another delimiter is between numbers with decimal commas.
    """
    for delimiter in _DELIMITERS[1:]:
        if all(delimiter in line for line in lines) and _has_decimal_commas(lines, delimiter):
            return delimiter
    for delimiter in _DELIMITERS:
        if delimiter not in lines[0]:
            continue
        widths = [len(row) for row in _parsed(reader(lines, delimiter=delimiter), 1)]
        if len(lines) == _HEAD_LINES:
            widths.pop()  # the last row may go on
        if delimiter == "," or len({*widths}) == 1:
            return delimiter
    return ","


def _has_decimal_commas(lines: Sequence[str], delimiter: str) -> bool:
    """Tell whether all cells with a comma are numbers, below the first line if there are more."""
    rows = [*_parsed(reader(lines, delimiter=delimiter), 1)]
    if len({len(row) for row in rows}) > 1:
        return False
    cells = itertools.chain.from_iterable(rows[1:] or rows)
    with_comma = [cell for cell in cells if "," in cell]
    return bool(with_comma) and all(map(_shows_number, with_comma))


def _shows_number(cell: str) -> bool:
    return is_number(cell) or formatted_number(cell) is not None


def _is_header(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether the first of these rows holds names: words, one of them above numbers.

    A single row of words does too.
    """
    first, *others = rows
    if any(map(is_number, first)):
        return False
    if not others:
        return _has_only_words(first)
    for name, *cells in zip(first, *others, strict=False):
        values = [cell for cell in cells if not is_missing(cell)]
        if is_missing(name) or not values:
            continue
        if all(map(is_number, values)):
            return True
        if all(map(_shows_number, values)) and not _shows_number(name):
            return True
    return False


def _has_only_words(row: Sequence[str]) -> bool:
    return not any(is_number(cell) or is_missing(cell) for cell in row)


def _column_names(cells: Sequence[str]) -> list[str]:
    """Return the names in a header; ValueError if one occurs twice."""
    names = [cell.strip() for cell in cells]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"its header names {repeated[0]!r} more than once; rename one: a copy of the target "
            "among the features would leak it"
        )
    return names
