"""Metrics rows as comma-separated values."""

import csv
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, final

from stepctl.rundir.directory import RunDirectory
from stepctl.system.files import write_errors
from stepctl.writers.base import FIRST_KEYS, FileWriter, MetricsRow
from stepctl.writers.jsonl import json_value

_ROWS_AT_A_TIME = 1000
_MAX_HEADER = 1 << 20  # bytes
_SEARCHED_BYTES = 1 << 20  # at a time


@final
class CSV(FileWriter):
    """Keeps metrics.csv equal to metrics.jsonl.

    The columns are step, kind, extra, then the metrics in order of appearance. Rows must be in
    metrics.jsonl before they are written here. The file is rewritten from metrics.jsonl at the
    start, and when a row has a new column. A long table that has the newest rows is only cut after
    them at the start: it was complete when a segment began, and has had all rows since.
    """

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__(directory.display_path(directory.csv))
        self._directory = directory
        self._columns: list[str] = []
        if not self._cut():
            self._rewrite()

    def write(self, rows: Sequence[MetricsRow]) -> None:
        columns = set(self._columns)
        is_our_file = self._directory.folder.is_open_file(self._path.name, self._descriptor)
        if not is_our_file or not all(row.keys() <= columns for row in rows):
            self._rewrite()
            return
        with write_errors(self._path):
            self._directory.folder.check_not_moved()
            self._append(csv_bytes(self._columns, rows))

    def _rewrite(self) -> None:
        columns = dict.fromkeys(FIRST_KEYS)
        for row in self._directory.read_metrics():
            if not row.keys() <= columns.keys():
                columns |= dict.fromkeys(row)
        self._columns = list(columns)
        with self._lock:
            self._directory.folder.publish(self._path.name, self._content())
            with write_errors(self._path):
                old_descriptor = self._descriptor
                self._descriptor = self._directory.folder.open_to_append(self._path.name)
                if old_descriptor >= 0:
                    os.close(old_descriptor)

    def _content(self) -> Iterator[bytes]:
        """Yield the header and all rows of metrics.jsonl."""
        yield csv_bytes(self._columns, [{name: name for name in self._columns}])
        rows = self._directory.read_metrics()
        while some := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
            yield csv_bytes(self._columns, some)

    def _cut(self) -> bool:
        """Open a table that ends with the newest rows, after cutting later ones; False without them."""
        newest = self._directory.newest_metrics()
        if newest.offset == 0:
            return False  # the rows are few
        name = self._path.name
        folder = self._directory.folder
        try:
            with folder.open_regular(name) as file:
                header = file.readline(_MAX_HEADER).decode()
                columns = next(csv.reader([header]))
                if not all(row.keys() <= set(columns) for row in newest.rows):
                    return False
                end = _find_last(file, b"\n" + csv_bytes(columns, newest.rows))
        except (OSError, ValueError, csv.Error, StopIteration):
            return False
        if end is None:
            return False
        folder.truncate(name, end)
        self._columns = columns
        with write_errors(self._path):
            self._descriptor = folder.open_to_append(name)
        return True


def _find_last(file: BinaryIO, wanted: bytes) -> int | None:
    """Return the offset after the last occurrence of some bytes; None without one."""
    end = os.fstat(file.fileno()).st_size
    while end >= len(wanted):
        start = max(end - len(wanted) - _SEARCHED_BYTES, 0)
        file.seek(start)
        found = file.read(end - start).rfind(wanted)
        if found >= 0:
            return start + found + len(wanted)
        if start == 0:
            break
        end = start + len(wanted) - 1
    return None


def csv_bytes(columns: Sequence[str], rows: Iterable[MetricsRow]) -> bytes:
    """Return a CSV line for each row, with an empty cell for a column that the row lacks."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for row in rows:
        lines.writerow([_cell(row.get(name)) for name in columns])
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json_value(value)
