"""The columns of a table: what kind each is, and how its cells become numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
from pydantic import BaseModel, ConfigDict

from stepctl.data.csv_file import is_missing, is_number
from stepctl.data.number_formats import FormattedNumber, formatted_number
from stepctl.state.arena import Array
from stepctl.system.text import config_text, in_one_line

Name = str | int  # of a column: its name, or its number from 0 in a file without a header
Kind = Literal["number", "boolean", "category", "class"]
Role = Literal["feature", "class", "value"]  # of a column; the last two are those of a target

MAX_CATEGORIES = 100  # of a column of words; 1,000 of one that the config lists
MAX_LISTED_CATEGORIES = 1000
_BOOLEANS = {"false": 0.0, "no": 0.0, "true": 1.0, "yes": 1.0}
# ISO 8601 and what spreadsheets write: 2024-01-31, 31.1.2024 12:30, 1/31/24, 12:30:05
_DATE = re.compile(
    r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))"
    r"([T ]+\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?( ?[AaPp][Mm])?(Z|[+-]\d{2}:?\d{2})?)?"
    r"|\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?",
    re.ASCII,
)


class Encoding(BaseModel):
    """How a column that does not hold numbers is encoded, as the config records it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    column: Name
    kind: Literal["boolean", "category", "class"]
    categories: list[str] = []  # of a category; the names of classes are a key of their own


def label(name: Name) -> str:
    """Return a column's name in messages: "column 'age'", or "column 3", counted from 1."""
    if isinstance(name, int):
        return f"column {name + 1}"
    return f"column {in_one_line(repr(name), 60)}"


class CellError(ValueError):
    """A cell that cannot be encoded; `row` is its row among the cells."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


@final
@dataclass(frozen=True)
class Column:
    """One column: numbers, booleans, categories (one-hot features), or the names of classes."""

    name: Name
    kind: Kind = "number"
    categories: tuple[str, ...] = ()  # sorted; of a class column the names of the classes

    @property
    def feature_names(self) -> list[str]:
        """The names of its features: its own, or one for each category."""
        if self.kind == "category":
            return [f"{self.name}={category}" for category in self.categories]
        return [str(self.name)]

    def encode(self, cells: Sequence[str]) -> Array:
        """Return the features of these cells: (cells, features) float64, NaN for missing cells.

        Those of a class column are its labels. Raises CellError at the first cell that the column
        cannot have.
        """
        if self.kind == "number":
            return self._numbers(cells)
        codes = _Codes(self._code)
        try:
            found = np.array([codes[cell] for cell in cells], np.float64)
        except KeyError as error:
            row = cells.index(error.args[0])
            raise CellError(row, self._refusal(cells[row])) from None
        if self.kind != "category":
            return found.reshape(-1, 1)
        features = np.full((len(cells), len(self.categories)), np.nan)
        features[~np.isnan(found)] = 0
        rows = np.flatnonzero(~np.isnan(found))
        features[rows, found[rows].astype(np.int64)] = 1
        return features

    def _numbers(self, cells: Sequence[str]) -> Array:
        plain = _as_floats(cells)
        if plain is not None:
            return np.array(plain).reshape(-1, 1)
        numbers = np.empty((len(cells), 1))
        for row, cell in enumerate(cells):
            if is_number(cell):
                numbers[row] = float(cell)
            elif is_missing(cell):
                numbers[row] = np.nan
            else:
                raise CellError(row, self._refusal(cell))
        return numbers

    def _code(self, cell: str) -> float:
        """Return the number of a cell that is no number; KeyError if there is none."""
        word = cell.strip()
        if self.kind == "boolean":
            if word.lower() in _BOOLEANS:
                return _BOOLEANS[word.lower()]
        elif word in self.categories:
            return self.categories.index(word)
        if is_missing(cell):
            return np.nan
        raise KeyError(cell)

    def _refusal(self, cell: str) -> str:
        shown = in_one_line(repr(cell), 60)
        if self.kind == "number":
            formatted = formatted_number(cell)
            if formatted is not None:
                plain = " or ".join(formatted.plain)
                return f"{shown} has {formatted.what}; write {plain}"
            return f"{shown} is not a number"
        if self.kind == "boolean":
            return f"{shown} is none of true, false, yes, no"
        noun = "class" if self.kind == "class" else "category"
        known = in_one_line(", ".join(self.categories), 200)
        return f"{shown} is a {noun} that the run does not have; it has: {known}"


def _as_floats(cells: Sequence[str]) -> list[float] | None:
    """Return cells as floats; None if one is not a number, or has "_" or digits beyond ASCII."""
    text = "".join(cells)
    if "_" in text or not text.isascii():
        return None
    try:
        return [*map(float, cells)]
    except ValueError:
        return None


class _Codes(dict[str, float]):
    """The codes of the cells of a column, computed once for each text."""

    def __init__(self, code: Callable[[str], float]) -> None:
        super().__init__()
        self._code = code

    def __missing__(self, cell: str) -> float:
        code = self[cell] = self._code(cell)
        return code


@final
class ColumnFacts:
    """Counts of a column's cells, which determine its kind; `is_listed` in `data.categorical`.

    A cell is a number, a number in the format of a spreadsheet ("formatted"), a word, or missing.
    """

    def __init__(
        self, name: Name, *, role: Role = "feature", is_listed: bool, delimiter: str
    ) -> None:
        self.name = name
        self._delimiter = delimiter
        self._role = role
        self._is_listed = is_listed
        self._limit = MAX_LISTED_CATEGORIES if is_listed else MAX_CATEGORIES
        self._n_cells = {"number": 0, "formatted": 0, "word": 0}
        self._formatted: FormattedNumber | None = None  # the cell in `_first`
        self._first: dict[str, tuple[int, str]] = {}  # line and cell of the first of each
        self._words: set[str] = set()
        self._overflow: int | None = None  # the line at which there are too many words

    def add(self, lines: Iterable[int], cells: Sequence[str]) -> None:
        """Add the cells of some rows, which begin on these lines."""
        if not self._is_listed and _as_floats(cells) is not None:
            self._first.setdefault("number", (int(next(iter(lines))), cells[0]))
            self._n_cells["number"] += len(cells)
            return
        counts = Counter(cells)
        by_kind: dict[str, set[str]] = {kind: set() for kind in (*self._n_cells, "missing")}
        for cell in counts:
            by_kind[self._kind(cell)].add(cell)
        for kind in self._n_cells:
            found = by_kind[kind]
            self._n_cells[kind] += sum(counts[cell] for cell in found)
            if found and kind not in self._first:
                self._first[kind] = _first_of(found, lines, cells)
        self._find_unambiguous(by_kind["formatted"], lines, cells)
        self._add_words(by_kind["word"] | by_kind["formatted"], lines, cells)

    def _find_unambiguous(
        self, found: set[str], lines: Iterable[int], cells: Sequence[str]
    ) -> None:
        """Keep the first formatted number that has one meaning; "1,234" has two."""
        if self._formatted is not None and len(self._formatted.plain) == 1:
            return
        meanings = {cell: formatted_number(cell) for cell in found}
        for line, cell in zip(lines, cells, strict=True):
            meaning = meanings.get(cell)
            if meaning is None:
                continue
            if self._formatted is None or len(meaning.plain) == 1:
                self._formatted = meaning
                self._first["formatted"] = (int(line), cell)
            if len(meaning.plain) == 1:
                return

    def _add_words(self, words: set[str], lines: Iterable[int], cells: Sequence[str]) -> None:
        """Add the words among some cells, up to the limit."""
        if self._overflow is not None:
            return
        stripped = {word.strip() for word in words}
        if len(self._words | stripped) <= self._limit:
            self._words |= stripped
            return
        for line, cell in zip(lines, cells, strict=True):
            if cell in words:
                self._words.add(cell.strip())
            if len(self._words) > self._limit:
                self._overflow = int(line)
                return

    def _kind(self, cell: str) -> str:
        if is_missing(cell):
            return "missing"
        if self._is_listed:
            return "word"
        if is_number(cell):
            return "number"
        return "word" if formatted_number(cell) is None else "formatted"

    def column(self, *, may_have_header: bool = False) -> Column:
        """Return the column; ValueError if its cells have no common kind.

        `may_have_header`: the first row of the file has only words.
        """
        if not self._first:
            raise ValueError(f"{label(self.name)} has no values; {self._exclude}")
        self.refuse_formatted()
        if "word" not in self._first:
            return Column(self.name)
        if "number" in self._first:
            raise ValueError(self._mixed(may_have_header=may_have_header))
        is_boolean = {word.lower() for word in self._words} <= _BOOLEANS.keys()
        if is_boolean and not self._is_listed and self._role != "class":
            return Column(self.name, "boolean")
        self._refuse_words()
        categories = tuple(sorted(self._words, key=_sort_key(self._words)))
        return Column(self.name, "class" if self._role == "class" else "category", categories)

    def refuse_formatted(self, *, only_commas: bool = False) -> None:
        """Raise ValueError if there are more formatted numbers (`only_commas`: 17,5) than words."""
        formatted = self._formatted
        if formatted is None or self._n_cells["formatted"] <= self._n_cells["word"]:
            return
        if only_commas and not formatted.has_comma:
            return
        line, cell = self._first["formatted"]
        plain = " or ".join(formatted.plain)
        remedy = f", or take all for categories: data.categorical: [{config_text(self.name)}]"
        is_decimal = len(formatted.plain) == 1 and is_number(cell.replace(",", "."))
        if is_decimal and self._delimiter != ",":
            remedy = ", for example with: sed 's/,/./g' FILE"
        shown = in_one_line(repr(cell), 60)
        raise ValueError(
            f"line {line}: {label(self.name)}: {shown} has {formatted.what}; write {plain}{remedy}"
        )

    @property
    def _exclude(self) -> str:
        if self._role == "feature":
            return f"exclude it: data.exclude: [{config_text(self.name)}]"
        return "choose another target"

    def _refuse_words(self) -> None:
        """Raise ValueError if the words are no categories: dates, too many, or of a value."""
        where = label(self.name)
        line, word = self._first["word"]
        shown = in_one_line(repr(word.strip()), 60)
        if self._role == "value":
            raise ValueError(
                f"line {line}: {where}, the target, is {shown}, and the task learns numbers; choose "
                "another target or task"
            )
        if not self._is_listed and all(map(_DATE.fullmatch, self._words)):
            raise ValueError(
                f"line {line}: {where}: {shown} is a date, which is no feature as it is; convert it "
                f"to numbers (such as the month), or {self._exclude}"
            )
        if self._overflow is None:
            return
        remedy = self._exclude
        if not self._is_listed:
            remedy += f", or allow {MAX_LISTED_CATEGORIES:,}: data.categorical: [{config_text(self.name)}]"
        raise ValueError(
            f"line {self._overflow}: {where} has more than {self._limit} different words; {remedy}"
        )

    def _mixed(self, *, may_have_header: bool) -> str:
        where = label(self.name)
        rare = "word" if self._n_cells["word"] <= self._n_cells["number"] else "number"
        line, cell = self._first[rare]
        shown = in_one_line(repr(cell), 60)
        if rare == "number":
            other_line, other = self._first["word"]
            return (
                f"line {line}: {where}: {shown} is a number, but line {other_line} has "
                f"{in_one_line(repr(other), 60)}; fix it, or take all for categories: "
                f"data.categorical: [{config_text(self.name)}]"
            )
        message = f"line {line}: {where}: {shown} is not a number"
        if may_have_header and self._n_cells["word"] == 1:
            return f"{message}; if the first line holds names, set data.header: true"
        return (
            f"{message}, as the column's other cells are; fix it, or take all for categories: "
            f"data.categorical: [{config_text(self.name)}]"
        )


def _first_of(
    wanted: Container[str], lines: Iterable[int], cells: Sequence[str]
) -> tuple[int, str]:
    """Return the line and the cell of the first cell that is wanted."""
    return next(
        (int(line), cell) for line, cell in zip(lines, cells, strict=True) if cell in wanted
    )


def merged(column: Column, other: Column) -> Column:
    """Return a column with the categories of both, if both have some."""
    if column.kind != other.kind or not column.categories:
        return column
    words = {*column.categories, *other.categories}
    return replace(column, categories=tuple(sorted(words, key=_sort_key(words))))


def _sort_key(words: Iterable[str]) -> Callable[[str], Any]:
    """Return the key that sorts words: by their value if all are numbers, else as texts."""
    if all(map(is_number, words)):
        return lambda word: (float(word), word)
    return lambda word: word
