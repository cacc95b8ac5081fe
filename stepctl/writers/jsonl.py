"""Metrics rows as lines of JSON."""

import json
import math
import os
from collections.abc import Sequence
from typing import Any, final

from stepctl.errors import StepctlError
from stepctl.rundir.directory import RunDirectory
from stepctl.system.files import write_errors
from stepctl.writers.base import FileWriter, MetricsRow

_encoder = json.JSONEncoder(allow_nan=False)
_NON_FINITE = ("NaN", "Infinity", "-Infinity")


@final
class JSONLines(FileWriter):
    """Appends a line a row to metrics.jsonl; a non-finite float becomes a string, as "NaN"."""

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__(directory.display_path(directory.metrics))
        self._folder = directory.folder
        with write_errors(self._path):
            self._descriptor = self._folder.open_to_append(self._path.name)
            self._size = os.fstat(self._descriptor).st_size  # bytes, including this segment's

    def write(self, rows: Sequence[MetricsRow]) -> None:
        lines = [f"{_encode(row)}\n" for row in rows]
        data = "".join(lines).encode()
        with write_errors(self._path):
            self._folder.check_not_moved()
            if not self._folder.is_open_file(self._path.name, self._descriptor):
                self._reopen()
            if os.fstat(self._descriptor).st_size < self._size:
                raise StepctlError(
                    f"{self._path}: another program truncated the file during training; restore the "
                    "lost rows from a copy if there is one, then resume the run"
                )
            self._append(data)
            self._size += len(data)

    def _reopen(self) -> None:
        """Switch to the file that replaced the open one, if it begins with all rows so far.

        A deleted file is written again. StepctlError if rows are missing or differ; the rows are
        saved beside it.
        """
        name = self._path.name
        written = _read_all(self._descriptor)
        if self._folder.stat(name) is None:
            self._folder.publish(name, [written])
        replacement = self._folder.open_to_append(name)
        content = _read_all(replacement)
        has_partial_line = bool(content) and not content.endswith(b"\n")
        if not content.startswith(written) or has_partial_line:
            os.close(replacement)
            backup = self._folder.aside_name(name)
            self._folder.publish(backup, [written])
            raise StepctlError(
                f"{self._path}: another program replaced the file during training, and the new one "
                f"lacks rows or differs; the rows are saved as {backup}: rename it to {name}, then "
                "resume the run"
            )
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = replacement
            self._is_synced = False
            self._size = len(content)


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def _encode(row: MetricsRow) -> str:
    try:
        return _encoder.encode(row)
    except ValueError:  # a non-finite float
        return _encoder.encode({key: json_value(value) for key, value in row.items()})


def json_value(value: object) -> object:
    """Return a value in a form that JSON has: a non-finite float as a string."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return json.dumps(value)  # one of _NON_FINITE


def as_number(value: Any) -> float | None:
    """Return a value read from a row as a float; None if it is no number."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in _NON_FINITE):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
