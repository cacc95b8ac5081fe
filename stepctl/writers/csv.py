"""Rows as lines of comma-separated values."""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, final

from stepctl.files import fsync
from stepctl.folder import write_all, writing
from stepctl.rundir import RunDirectory
from stepctl.writers.base import Row, Writer
from stepctl.writers.jsonl import json_value

_FIRST = ("step", "kind", "extra")


@final
class CSV(Writer):
    """Keeps metrics.csv the same as metrics.jsonl: made anew from it at the start, and when a column is new.

    Columns are step, kind, extra, then every metric as it was first met. Stands behind the writer of
    metrics.jsonl, so that rows are there when they are asked for.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory, self._path = directory, directory.shown(directory.csv)
        self._columns: list[str] = []
        self._lock = threading.Lock()  # `sync` comes from another thread
        self._descriptor = -1
        self._make_anew()

    def write(self, rows: Sequence[Row]) -> None:
        known = set(self._columns)
        is_ours = self._directory.folder.names_open_file(self._path.name, self._descriptor)
        if not is_ours or not all(row.keys() <= known for row in rows):
            self._make_anew()
            return
        with writing(self._path):
            self._directory.folder.check()
            write_all(self._descriptor, as_text(self._columns, rows))

    def sync(self) -> None:
        with self._lock, writing(self._path):
            fsync(self._descriptor)

    def close(self) -> None:
        with writing(self._path):
            os.close(self._descriptor)

    def _make_anew(self) -> None:
        rows = self._directory.read_metrics()
        self._columns = list(dict.fromkeys([*_FIRST, *(name for row in rows for name in row)]))
        head: Row = dict(zip(self._columns, self._columns, strict=True))
        with self._lock:
            self._directory.folder.publish(self._path.name, [as_text(self._columns, [head, *rows])])
            with writing(self._path):
                before, self._descriptor = self._descriptor, self._directory.folder.open_to_append(self._path.name)
                if before >= 0:
                    os.close(before)


def as_text(columns: Sequence[str], rows: Iterable[Row]) -> bytes:
    """Return a line a row, with an empty cell where it has nothing for a column."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else json_value(value)
