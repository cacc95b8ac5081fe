"""Rows as lines of JSON."""

import json
import math
import os
from pathlib import Path
from typing import final

from stepctl.rundir import writing
from stepctl.writers.base import Row, Writer


@final
class JSONLines(Writer):
    """Appends to a file, a line a row. A float that JSON does not have is a string: "NaN", "Infinity"."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def write(self, row: Row) -> None:
        line = json.dumps({key: _value(item) for key, item in row.items()}).encode() + b"\n"
        with writing(self._path):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _value(item: object) -> object:
    if isinstance(item, float) and not math.isfinite(item):
        return "NaN" if math.isnan(item) else "Infinity" if item > 0 else "-Infinity"
    return item
