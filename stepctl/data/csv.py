"""Comma-separated numbers, gzipped or not."""

from __future__ import annotations

import io
from collections import Counter
from csv import Error, reader
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stepctl.data.base import Sources, Targets
from stepctl.data.files import read_bytes, reading
from stepctl.data.memory import InMemory
from stepctl.files import open_regular
from stepctl.problems import in_one_line
from stepctl.registry import File

_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
_DELIMITERS = {",": ",", ";": ";", "\t": "\\t", "|": "|"}  # and how YAML spells them between double quotes


def csv(
    *,
    path: File,
    validation_path: File | None = None,
    target: int | str = -1,
    header: bool = False,
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    scale: float = 1.0,
    targets: Targets,
    dtype: str,
) -> Sources:
    """One row a sample; column `target` (a number from 0, or with `header` a name) is y, all others are x."""

    def load(file: str) -> InMemory:
        with reading(file, "CSV"):
            with open_regular(file) as opened:
                text = _decode(read_bytes(opened))
            names, table = _parse(text, header, delimiter)
            column = _column(target, names, table.shape[1])
        features = np.delete(table, column, axis=1)
        return InMemory(
            features,
            table[:, column],
            origin=file,
            targets=targets,
            dtype=dtype,
            scale=scale,
            place=lambda row: f"line {_line_of(file, row, header, delimiter)}",
        )

    return Sources(load(path), load(validation_path) if validation_path else None)


def _line_of(file: str, row: int, header: bool, delimiter: str) -> int:
    """Return the line of the file on which a row of numbers begins; it is looked up only for a message."""
    with open_regular(file) as opened:
        text = _decode(read_bytes(opened))
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
    """Return the text with "\\n" as the end of each line, whichever the file has."""
    if data.startswith(_BYTE_ORDER_MARKS) or b"\0" in data[:1000]:
        raise ValueError("it is not UTF-8, but looks like UTF-16; convert it with: iconv -f UTF-16 -t UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"line {line}: it is not UTF-8 (byte 0x{data[error.start]:02x}); if it is Latin-1, convert it with: "
            "iconv -f LATIN1 -t UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse(text: str, header: bool, delimiter: str) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Return the column names, if there is a header, and the numbers: (rows, columns)."""
    names: list[str] = []
    file = io.StringIO(text)
    if header:
        names = _names(file, delimiter)
    start = file.tell()
    if not text[start:].strip():
        raise ValueError("it holds no rows")
    try:
        table = np.loadtxt(file, delimiter=delimiter, ndmin=2, comments=None, quotechar='"')
    except ValueError as error:
        raise ValueError(_explain(text, header, delimiter) or str(error).partition(";")[0]) from error
    if table.shape[1] == 1 and (suggestion := _other_delimiter(text, delimiter)):
        raise ValueError(suggestion)
    if names and len(names) != table.shape[1]:
        raise ValueError(f"its header names {len(names)} columns, but its rows have {table.shape[1]}")
    return names, table


def _names(file: io.StringIO, delimiter: str) -> list[str]:
    """Read the header, which may span lines between quotes; leave the file at the line after it."""
    try:
        rows = reader(iter(file.readline, ""), delimiter=delimiter)
        names = [name.strip() for name in next((row for row in rows if row), [])]
    except Error as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"its header names {repeated[0]!r} more than once; rename one, since a copy of the target among "
            "the features gives the answer away"
        )
    return names


def _explain(text: str, header: bool, delimiter: str) -> str | None:
    """Return what is wrong in the first bad row, with its line in the file; None if no row is."""
    lines = reader(io.StringIO(text, newline=""), delimiter=delimiter)
    n_columns: int | None = None
    first = True
    line = 1
    try:
        for row in lines:
            this_line, line = line, lines.line_num + 1
            if not row:
                continue
            if first and header:
                first = False
                continue
            problem = _row_problem(row, n_columns)
            if problem is not None:
                return f"line {this_line}: {problem}{_hint(text, row, delimiter, first=first)}"
            n_columns, first = len(row), False
    except Error as error:
        return f"line {line}: {error}"
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
    # names: not a number among them, and none empty
    if first and all(value.strip() and not _is_number(value) for value in row):
        return "; if the first line holds names, set data.header: true"
    return ""


def _other_delimiter(text: str, delimiter: str) -> str | None:
    """Return a suggestion if the first lines are not split by the delimiter, but evenly by another."""
    lines = [line for line in text.split("\n", 10)[:10] if line.strip()]
    if any(delimiter in line for line in lines[:1]):
        return None
    for other, spelled in _DELIMITERS.items():
        counts = {line.count(other) for line in lines}
        if len(counts) == 1 and counts != {0}:
            return f'its columns seem to be split by {other!r}: set data.delimiter: "{spelled}"'
    return None


def _is_number(value: str) -> bool:
    if "_" in value:  # which float takes, and NumPy does not
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _column(target: int | str, names: list[str], n_columns: int) -> int:
    if isinstance(target, int):
        if not -n_columns <= target < n_columns:
            raise ValueError(f"no column {target}; it has {n_columns}")
        return target
    if not names:
        raise ValueError(f"data.target is the name {target!r}, but data.header is false; set it to true")
    if target not in names:
        raise ValueError(f"no column {target!r}; it has {', '.join(names)}")
    return names.index(target)
