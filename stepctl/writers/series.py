"""Rows of series: collected from the steps, appended to the files of a run."""

import os
import threading
from collections.abc import Mapping
from typing import final

import numpy as np

from stepctl.errors import ConfigError, StepctlError
from stepctl.rundir import series
from stepctl.rundir.series import RecordType
from stepctl.rundir.series_names import NAME
from stepctl.state.arena import Array
from stepctl.state.values import DTYPES
from stepctl.system.files import fsync, write_all, write_errors
from stepctl.system.folder import Folder
from stepctl.system.text import a_or_an

_FLUSH_BYTES = 1 << 18  # held at most


@final
class _Series:
    """The rows of one series that are not written yet, and its open file."""

    def __init__(self, name: str, kind: RecordType, last_step: int) -> None:
        self.name = name
        self.kind = kind
        self.last_step = last_step
        self.descriptor = -1
        self.pending = bytearray()
        self.dtype = np.dtype(kind.dtype)
        self._stored = self.dtype.newbyteorder("<")

    def add(self, step: int, value: object) -> None:
        array = as_row(self.name, value)
        if array.dtype != self.dtype or array.shape != self.kind.shape:
            raise ConfigError(
                f"series {self.name!r}: the row of step {step} is {array.dtype} {array.shape}, and the "
                f"first row was {self.kind}; all rows must have one dtype and shape"
            )
        if step <= self.last_step:
            raise ConfigError(f"series {self.name!r}: step {step} has a row already")
        self.last_step = step
        self.pending += step.to_bytes(8, "little")
        self.pending += array.astype(self._stored, copy=False).tobytes()


def as_row(name: str, value: object) -> Array:
    """Return a value as an array of the machine's byte order; ConfigError if it cannot be one."""
    if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
        raise ConfigError(
            f"series {name!r}: a row is {a_or_an(type(value).__name__)}; append a plain array: "
            "np.asarray(...)"
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ConfigError(f"series {name!r}: a row is no array: {error}") from error
    return array.astype(array.dtype.newbyteorder("="), copy=False)


@final
class SeriesBuffer:
    """Collects the rows of a segment's series.

    They are held until they are flushed: before each checkpoint, and when there are many. Without
    a run (in a replay) they stay in memory.
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._folder: Folder | None = None
        self._lock = threading.Lock()  # `sync` runs in another thread
        self._error: StepctlError | None = None
        self._missing: dict[str, int] = {}  # rows that an earlier segment wrote
        self._files: set[str] = set()  # the series that have files

    def open(self, folder: Folder, expected: Mapping[str, int]) -> dict[str, int]:
        """Continue the series of a run; later rows are removed.

        `expected` are the numbers of rows up to the start, as the ledger has them. Returns the
        number of missing rows of each series that lacks some; they stay missing in `counts`, for
        `stepctl verify`.
        """
        self._folder = folder
        found: dict[str, int] = {}
        for name in series.names(folder):
            kind = series.read_type(folder, name)
            tail = series.cut(folder, name, kind, expected.get(name, 0))
            self._series[name] = _Series(name, kind, tail.last_step)
            found[name] = tail.n_rows
        self._files = set(found)
        for name, n_rows in expected.items():
            if n_rows > found.get(name, 0):
                self._missing[name] = n_rows - found.get(name, 0)
        return self._missing

    def add(self, step: int, rows: Mapping[str, object]) -> None:
        """Add the rows of one step; ConfigError if a name, dtype or shape is wrong."""
        for name, value in rows.items():
            found = self._series.get(name)
            if found is None:
                found = self._create(name, value)
            found.add(step, value)
            if len(found.pending) > _FLUSH_BYTES and self._folder is not None:
                self.flush()

    def _create(self, name: str, value: object) -> _Series:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"series {name!r}: use letters, digits, '_', '.' and '-' in its name")
        array = as_row(name, value)
        if array.dtype.name not in DTYPES:
            raise ConfigError(
                f"series {name!r}: a row of dtype {array.dtype} cannot be saved; use bool, an "
                "integer, float16 to float64, or complex"
            )
        created = _Series(name, RecordType(array.dtype.name, array.shape), -1)
        self._series[name] = created
        return created

    def flush(self) -> None:
        """Write the held rows. After an error, which may leave a part of one, each call fails."""
        if self._error is not None:
            raise self._error
        if self._folder is None:
            return
        try:
            for found in self._series.values():
                if found.pending:
                    self._write(self._folder, found)
        except StepctlError as error:
            self._error = error
            raise

    def _write(self, folder: Folder, found: _Series) -> None:
        with self._lock, write_errors(folder.display_path / found.name):
            if found.descriptor < 0:
                if found.name not in self._files:
                    series.create(folder, found.name, found.kind)
                    self._files.add(found.name)
                found.descriptor = series.open_to_append(folder, found.name)
                folder.sync()
            folder.check_not_moved()
            self._check_not_replaced(folder, found)
            write_all(found.descriptor, bytes(found.pending))
        found.pending = bytearray()

    def _check_not_replaced(self, folder: Folder, found: _Series) -> None:
        if not series.is_open_file(folder, found.name, found.descriptor):
            raise StepctlError(
                f"{folder.display_path / found.name}.bin: was removed or replaced during training; "
                "restore it from a copy, then resume the run"
            )

    def sync(self) -> None:
        """Make the written rows durable; may be called from any thread."""
        if self._folder is None:
            return
        with self._lock, write_errors(self._folder.display_path):
            for found in list(self._series.values()):
                if found.descriptor >= 0:
                    fsync(found.descriptor)

    def counts(self, step: int) -> dict[str, int]:
        """Return the number of rows up to `step` of each series, missing ones included."""
        if self._folder is None:
            return {}
        for found in list(self._series.values()):
            if found.descriptor >= 0:
                self._check_not_replaced(self._folder, found)
        counts = dict(self._missing)
        for name in list(self._files):
            counts[name] = counts.get(name, 0) + series.count_rows(self._folder, name, step)
        return counts

    def discard(self) -> None:
        """Forget all rows that are held."""
        self._series.clear()

    def names(self) -> list[str]:
        """Return the names of the series."""
        return list(self._series)

    def held(self, name: str, kind: RecordType) -> Array:
        """Return the rows in memory as records; no records of this type if there is no such series."""
        found = self._series.get(name)
        if found is None:
            return np.empty(0, kind.record)
        return np.frombuffer(bytes(found.pending), found.kind.record)

    def close(self) -> None:
        """Close the files; nothing is written afterwards."""
        for found in self._series.values():
            if found.descriptor >= 0:
                os.close(found.descriptor)
                found.descriptor = -1
