"""Proposing a data section for a CSV file: its target, its task, and the columns to leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from stepctl.data.columns import ColumnFacts, Name
from stepctl.data.csv_file import CSVFile, is_missing, is_number
from stepctl.data.files import reading
from stepctl.errors import DataError
from stepctl.system import files
from stepctl.system.text import in_one_line

Task = Literal["classification", "regression"]

VALIDATION_FRACTION = 0.2
_MIN_ROWS = 10
_MAX_CLASSES = 20  # of a target of whole numbers
_ROWS_OF_CLASS = 5  # on average, at least; otherwise whole numbers are values
_MAX_VALUES = 1000  # different ones that are counted
_TARGETS = ("target", "label", "class", "species", "outcome", "y")  # names that a target often has


class Proposal(NamedTuple):
    """The keys of a data section besides its path, and the facts they follow from.

    classes: the names of the classes, [] for numbers; excluded: why a column is left out.
    """

    section: dict[str, Any]
    task: Task
    n_rows: int
    classes: list[str]
    excluded: dict[Name, str]


def propose(path: str) -> Proposal:
    """Read a CSV file and propose a data section; DataError if it can be no table to learn from."""
    files.refuse_broken_link(path)
    if not files.exists(path):
        raise DataError(f"{in_one_line(path)}: no such file; give the CSV file to learn from")
    with reading(path, "CSV"):
        file = CSVFile(path)
        scans = _scan(file)
        n_rows = scans[0].n_rows
        if n_rows < _MIN_ROWS:
            raise ValueError(f"it has {n_rows} rows; at least {_MIN_ROWS} are needed to validate")
        target = _choose_target(scans)
        features = [scan for scan in scans if scan is not target]
        excluded = {scan.name: scan.problem for scan in features if scan.problem}
        if len(excluded) == len(features):
            reasons = "; ".join(excluded.values())
            raise ValueError(f"it has no column of features: {in_one_line(reasons)}")
    section: dict[str, Any] = {"target": target.name}
    if target.is_class and not target.labels_are_numbered:
        section |= {"categorical": [target.name]} if target.is_numeric else {}
    if excluded:
        section["exclude"] = [*excluded]
    kept = [scan for scan in features if scan.name not in excluded]
    if target.n_missing:
        section["missing"] = "drop"
    elif any(scan.n_missing for scan in kept):
        section["missing"] = "mean"
    if any(scan.is_numeric for scan in kept):
        section["standardize"] = True
    section["validation_fraction"] = VALIDATION_FRACTION
    classes = target.classes
    if classes and min(target.counts.values()) * VALIDATION_FRACTION >= 1:
        section["stratify"] = True
    task: Task = "classification" if target.is_class else "regression"
    return Proposal(section, task, n_rows - target.n_missing, classes, excluded)


class _Scan:
    """The facts about the cells of one column."""

    def __init__(self, name: Name, delimiter: str) -> None:
        self.name = name
        self.n_rows = 0
        self.n_missing = 0
        self.counts = Counter[str]()  # of the values, as long as there are few
        self._facts = ColumnFacts(name, is_listed=False, delimiter=delimiter)
        self._is_row_number = True
        self._first_number: float | None = None

    def add(self, lines: Iterable[int], cells: Sequence[str]) -> None:
        """Add the cells of some rows."""
        self._facts.add(lines, cells)
        for cell in cells:
            word = cell.strip()
            if is_missing(word):
                self.n_missing += 1
            elif len(self.counts) <= _MAX_VALUES:
                self.counts[word] += 1
            self._is_row_number = self._is_row_number and self._continues(word)
            self.n_rows += 1

    def refuse_decimal_commas(self) -> None:
        """Raise ValueError if the cells are numbers with decimal commas: no column to leave out."""
        self._facts.refuse_formatted(only_commas=True)

    def _continues(self, cell: str) -> bool:
        """Tell whether a cell is the number of its row, counted from the first cell's."""
        if not is_number(cell):
            return False
        number = float(cell)
        if self._first_number is None:
            self._first_number = number
        return number == self._first_number + self.n_rows

    @property
    def problem(self) -> str | None:
        """Why the column can be no feature; None if it can."""
        if self._is_row_number:
            return f"{self.name}: it is the number of the row"
        try:
            self._facts.column()
        except ValueError as error:
            return str(error).partition(";")[0]
        if len(self.counts) == 1 and not self.n_missing:
            return f"{self.name}: it has the same value in all rows"
        return None

    @property
    def is_numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(map(is_number, self.counts))

    @property
    def is_class(self) -> bool:
        """Whether the values, as a target, are classes: words, or a few whole numbers."""
        if not self.is_numeric:
            return True
        if any(float(value) % 1 for value in self.counts):
            return False
        n_classes = len(self.counts)
        return n_classes <= _MAX_CLASSES and self.n_rows >= _ROWS_OF_CLASS * n_classes

    @property
    def labels_are_numbered(self) -> bool:
        """Whether the values are 0, 1, 2, ..."""
        if not self.is_numeric:
            return False
        return sorted(map(float, self.counts)) == [*range(len(self.counts))]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, if the values are classes."""
        if not self.is_class:
            return []
        if self.is_numeric:
            return sorted(self.counts, key=float)
        return sorted(self.counts)


def _scan(file: CSVFile) -> list[_Scan]:
    """Read all cells; ValueError if a column has decimal commas."""
    names = file.head.names or range(file.head.n_columns)
    scans = [_Scan(name, file.head.delimiter) for name in names]
    for block in file.blocks():
        block.check_width(file.head.n_columns)
        for position, scan in enumerate(scans):
            scan.add(block.lines, [row[position] for row in block.cells])
    for scan in scans:
        scan.refuse_decimal_commas()
    return scans


def _choose_target(scans: Sequence[_Scan]) -> _Scan:
    """Return the column with a target's name, else the last one that may be a target."""
    named = [scan for scan in scans if str(scan.name).lower() in _TARGETS]
    for scan in [*named, *reversed(scans)]:
        if scan.problem is None:
            return scan
    raise ValueError(
        "it has no column that can be a target: all are constant, dates or texts; to choose one, set "
        "data.target in a config of your own"
    )
