"""Series: one array per step, appended to a file; `series/NAME.bin` and `series/NAME.json`.

    samples = load_series("runs/walk", "samples")  # (rows, *shape)
    steps, samples = load_series("runs/walk", "samples", steps=True)

The file NAME.bin holds records of one size, in ascending order of their steps: the step as int64, then the value, both
little-endian. NAME.json has the dtype and the shape of a value, so that

    np.fromfile("series/NAME.bin", [("step", "<i8"), ("value", dtype, shape)])

reads it. A kill may leave a part of a record at the end, and records past the newest checkpoint: readers ignore the
first, and a resume cuts both.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stepctl.errors import ConfigError, DataError
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.series_names import NAME
from stepctl.state.arena import Array
from stepctl.state.values import DTYPES
from stepctl.system.files import fsync, is_unavailable, unreadable, write_errors
from stepctl.system.folder import Folder
from stepctl.system.text import did_you_mean, in_one_line

_BIN = ".bin"
_JSON = ".json"
_MAX_JSON = 1 << 16  # bytes
_STEP_BYTES = 8
_BLOCK_BYTES = 1 << 22  # read at a time


@dataclass(frozen=True)
class RecordType:
    """The dtype and shape of the values of a series."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def record(self) -> np.dtype[Any]:
        """The dtype of a record."""
        value = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype([("step", "<i8"), ("value", value, self.shape)])

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def text(self) -> bytes:
        """Return the content of NAME.json."""
        return json.dumps({"dtype": self.dtype, "shape": list(self.shape)}).encode() + b"\n"


class Tail(NamedTuple):
    """The end of a series: its number of records, and the step of the last one, -1 without one."""

    n_rows: int
    last_step: int


def series_folder(directory: RunDirectory) -> Folder:
    """Return the folder of a run's series, which need not exist."""
    return directory.folder.subfolder(directory.series.name)


def names(folder: Folder) -> list[str]:
    """Return the names of the series."""
    return sorted(
        name.removesuffix(_JSON)
        for name in folder.names()
        if name.endswith(_JSON) and NAME.fullmatch(name.removesuffix(_JSON))
    )


def read_type(folder: Folder, name: str) -> RecordType:
    """Read NAME.json; DataError if it is damaged."""
    path = folder.display_path / f"{name}{_JSON}"
    try:
        with folder.open_regular(path.name) as file:
            found = json.loads(file.read(_MAX_JSON))
        shape = tuple(found["shape"])
        if found["dtype"] not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("not a dtype and a shape")
        kind = RecordType(found["dtype"], shape)
        _ = kind.record  # too large a shape
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(
            in_one_line(f"{path}: damaged ({error}); restore it, or move the series away")
        ) from error
    return kind


def create(folder: Folder, name: str, kind: RecordType) -> None:
    """Create the folder, and NAME.json durably."""
    with write_errors(folder.display_path):
        folder.create()
    folder.publish(f"{name}{_JSON}", [kind.text()])


def is_open_file(folder: Folder, name: str, descriptor: int) -> bool:
    """Tell whether NAME.bin is still the open file, and NAME.json is there."""
    has_type = folder.stat(f"{name}{_JSON}") is not None
    return has_type and folder.is_open_file(f"{name}{_BIN}", descriptor)


def open_to_append(folder: Folder, name: str) -> int:
    """Open NAME.bin, and return its descriptor."""
    return folder.open_to_append(f"{name}{_BIN}")


def cut(folder: Folder, name: str, kind: RecordType, n_rows: int) -> Tail:
    """Remove all but the first `n_rows` records; return how many are left, and the last one's step."""
    file_name = f"{name}{_BIN}"
    with write_errors(folder.display_path / file_name):
        if folder.stat(file_name) is None:
            return Tail(0, -1)
        descriptor = folder.open(file_name, os.O_RDWR | os.O_NOFOLLOW)
        try:
            size = kind.record.itemsize
            n = min(n_rows, os.fstat(descriptor).st_size // size)
            if n * size != os.fstat(descriptor).st_size:
                os.ftruncate(descriptor, n * size)
                fsync(descriptor)
            return Tail(n, _step_of(descriptor, size, n - 1) if n else -1)
        finally:
            os.close(descriptor)


def count(descriptor: int, record_bytes: int, step: int) -> int:
    """Return the number of records up to `step`, by bisection.

    A power cut may leave zeros in the place of records that were not durable; steps are positive.
    """
    low = 0
    high = os.fstat(descriptor).st_size // record_bytes
    if high and 0 < _step_of(descriptor, record_bytes, high - 1) <= step:
        return high
    while low < high:
        middle = (low + high) // 2
        if 0 < _step_of(descriptor, record_bytes, middle) <= step:
            low = middle + 1
        else:
            high = middle
    return low


def _step_of(descriptor: int, record_bytes: int, number: int) -> int:
    data = os.pread(descriptor, _STEP_BYTES, number * record_bytes)
    return int.from_bytes(data, "little", signed=True)


def count_rows(folder: Folder, name: str, step: int) -> int:
    """Return the number of rows of a series up to `step`; 0 if its file is missing."""
    kind = read_type(folder, name)
    try:
        with folder.open_regular(f"{name}{_BIN}") as file:
            return count(file.fileno(), kind.record.itemsize, step)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise unreadable(folder.display_path / f"{name}{_BIN}", error) from error


def read(folder: Folder, name: str, *, after: int = -1, last: int | None = None) -> Array:
    """Return the records of the steps past `after` up to `last`, as a structured array."""
    kind = read_type(folder, name)
    path = folder.display_path / f"{name}{_BIN}"
    size = kind.record.itemsize
    try:
        with folder.open_regular(path.name) as file:
            descriptor = file.fileno()
            first = count(descriptor, size, after)
            end = os.fstat(descriptor).st_size // size
            if last is not None:
                end = count(descriptor, size, last)
            file.seek(first * size)
            return np.fromfile(file, kind.record, max(end - first, 0))
    except FileNotFoundError:
        return np.empty(0, kind.record)
    except OSError as error:
        if is_unavailable(error):
            raise unreadable(path, error) from error
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_steps(folder: Folder, name: str) -> Array:
    """Return the steps of all records, (rows,) int64, without their values in memory."""
    kind = read_type(folder, name)
    path = folder.display_path / f"{name}{_BIN}"
    at_a_time = max(_BLOCK_BYTES // kind.record.itemsize, 1)
    found = [np.empty(0, np.int64)]
    try:
        with folder.open_regular(path.name) as file:
            n_rows = os.fstat(file.fileno()).st_size // kind.record.itemsize
            for first in range(0, n_rows, at_a_time):
                records = np.fromfile(file, kind.record, min(at_a_time, n_rows - first))
                found.append(records["step"].astype(np.int64))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unreadable(path, error) from error
    return np.concatenate(found)


def load_series(
    run_dir: str | os.PathLike[str], name: str, *, steps: bool = False
) -> Array | tuple[Array, Array]:
    """Return a run's series, (rows, *shape); with `steps`, (their steps, the series).

    ConfigError if there is no such series, DataError if its files are damaged.
    """
    directory = RunDirectory(run_dir)
    directory.refuse_missing_run()
    folder = series_folder(directory)
    known = names(folder)
    if name not in known:
        there = ", ".join(known) or "none"
        raise ConfigError(
            f"{os.fspath(run_dir)}: no series {name!r}{did_you_mean(name, known)}; there are: {there}"
        )
    records = read(folder, name)
    if (records["step"][1:] <= records["step"][:-1]).any():
        raise DataError(f"{folder.display_path / name}{_BIN}: damaged: its steps do not ascend")
    values = np.ascontiguousarray(records["value"])
    if steps:
        return np.ascontiguousarray(records["step"]), values
    return values
