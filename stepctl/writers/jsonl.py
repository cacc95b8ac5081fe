"""Rows as lines of JSON."""

import json
import math
import os
import threading
from collections.abc import Sequence
from typing import Any, final

from stepctl.errors import StepctlError
from stepctl.files import fsync
from stepctl.folder import write_all, writing
from stepctl.rundir import RunDirectory
from stepctl.writers.base import Row, Writer

_encoder = json.JSONEncoder(allow_nan=False)
_NON_FINITE = ("NaN", "Infinity", "-Infinity")


@final
class JSONLines(Writer):
    """Appends to metrics.jsonl, a line a row. A float that JSON does not have is a string: "NaN", "Infinity"."""

    def __init__(self, directory: RunDirectory) -> None:
        self._folder, self._path = directory.folder, directory.shown(directory.metrics)
        self._lock = threading.Lock()  # `sync` comes from another thread
        with writing(self._path):
            self._descriptor = self._folder.open_to_append(self._path.name)
            self._size = os.fstat(self._descriptor).st_size  # bytes, with what was written here

    def write(self, rows: Sequence[Row]) -> None:
        text = "".join([f"{_as_text(row)}\n" for row in rows])
        with writing(self._path):
            self._folder.check()
            if not self._folder.names_open_file(self._path.name, self._descriptor):
                self._follow_replacement()
            if os.fstat(self._descriptor).st_size < self._size:
                raise StepctlError(
                    f"{self._path}: was cut short by another program while it was written; put the rows back if there "
                    "is a copy of them, then resume the run"
                )
            data = text.encode()
            write_all(self._descriptor, data)
            self._size += len(data)

    def sync(self) -> None:
        with self._lock, writing(self._path):
            fsync(self._descriptor)

    def _follow_replacement(self) -> None:
        """Go on in the file that took the place of the open one, as an editor's does, if it begins with all rows.

        A file that is only gone is written again. StepctlError if rows are missing or changed; they are kept aside.
        """
        name = self._path.name
        written = _content(self._descriptor)
        if self._folder.stat(name) is None:
            self._folder.publish(name, [written])
        replacement = self._folder.open_to_append(name)
        found = _content(replacement)
        if not found.startswith(written) or (found and not found.endswith(b"\n")):
            os.close(replacement)
            aside = self._folder.free_name(name)
            self._folder.publish(aside, [written])
            raise StepctlError(
                f"{self._path}: was replaced, while it was written, by a file that lacks rows or has other ones; "
                f"what it held is kept as {aside}: put the right file there, then resume the run"
            )
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = replacement
            self._size = len(found)

    def close(self) -> None:
        with writing(self._path):
            os.close(self._descriptor)


def _content(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def _as_text(row: Row) -> str:
    try:
        return _encoder.encode(row)
    except ValueError:  # a float that JSON does not have
        return _encoder.encode({key: json_value(item) for key, item in row.items()})


def json_value(item: object) -> object:
    """Return a value as JSON can hold it."""
    if isinstance(item, float) and not math.isfinite(item):
        return "NaN" if math.isnan(item) else "Infinity" if item > 0 else "-Infinity"
    return item


def as_number(item: Any) -> float | None:
    """Return a value of a row that was read again as a number, None if it is none."""
    if isinstance(item, bool) or not (isinstance(item, int | float) or item in _NON_FINITE):
        return None
    try:
        return float(item)
    except OverflowError:
        return None
