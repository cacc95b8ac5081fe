"""Metrics rows as comma-separated values."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any, final

from stepctl.rundir.directory import RunDirectory
from stepctl.system.files import write_errors
from stepctl.writers.base import FIRST_KEYS, FileWriter, MetricsRow
from stepctl.writers.jsonl import json_value


@final
class CSV(FileWriter):
    """Keeps metrics.csv equal to metrics.jsonl.

    The file is rewritten from metrics.jsonl at the start, and when a row has a new column.
    The columns are step, kind, extra, then the metrics in order of appearance. Rows must be in
    metrics.jsonl before they are written here.
    """

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__(directory.display_path(directory.csv))
        self._directory = directory
        self._columns: list[str] = []
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
        rows = self._directory.read_metrics()
        columns = dict.fromkeys(FIRST_KEYS)
        for row in rows:
            columns |= dict.fromkeys(row)
        self._columns = list(columns)
        header: MetricsRow = {name: name for name in columns}
        with self._lock:
            content = csv_bytes(self._columns, [header, *rows])
            self._directory.folder.publish(self._path.name, [content])
            with write_errors(self._path):
                old_descriptor = self._descriptor
                self._descriptor = self._directory.folder.open_to_append(self._path.name)
                if old_descriptor >= 0:
                    os.close(old_descriptor)


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
