"""Rows as TensorBoard's events, through its own package: no TensorFlow, no thread of its own."""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np

from stepctl.arena import Array, all_finite
from stepctl.extras import require
from stepctl.files import fsync
from stepctl.folder import Folder, write_all, writing
from stepctl.writers.base import Row, Writer

_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{10})\..*")
_FOLDERS = {"train": "train", "eval": "validation"}  # kind of a row -> what its curves' names begin with
_NO_METRIC = ("step", "kind", "extra")
_BUCKETS = 30


class Package(NamedTuple):
    """The parts of TensorBoard's package that write."""

    event: Any
    summary: Any
    records: Any


def load() -> Package:
    """Return TensorBoard's package; ConfigError says how to install it."""
    return Package(
        require("tensorboard.compat.proto.event_pb2", "tensorboard"),
        require("tensorboard.compat.proto.summary_pb2", "tensorboard"),
        require("tensorboard.summary.writer.record_writer", "tensorboard"),
    )


@final
class TensorBoard(Writer):
    """Writes a file a segment into tensorboard/: `train/loss`, `validation/loss`, ... on the global step.

    Each file begins with a session-start mark at the step after `start`, at which a viewer drops what an
    earlier segment wrote from there on. Rows marked extra are left out: they go when the run goes on, and a
    mark could not drop one at the restored step alone.
    """

    def __init__(
        self, folder: Folder, *, segment: int, start: int, batch_size: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._package, self._batch_size, self._clock = load(), batch_size, clock
        self._folder, self._segment = folder, segment
        self._lock = threading.Lock()  # `sync` comes from another thread
        self._begin_file(start + 1)

    def _begin_file(self, step: int) -> None:
        folder = self._folder
        with writing(folder.shown):
            folder.make()
            self._path = folder.shown / _file_name(folder.names(), self._segment)
            self._descriptor = folder.open(self._path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            folder.sync()
        self._records = self._package.records.RecordWriter(_Whole(self._descriptor))
        self._add(file_version="brain.Event:2")
        log = self._package.event.SessionLog
        self._add(step=step, session_log=log(status=log.START))

    def write(self, rows: Sequence[Row]) -> None:
        if rows and not self._folder.names_open_file(self._path.name, self._descriptor):  # somebody removed it
            with self._lock:
                os.close(self._descriptor)
                self._begin_file(rows[0]["step"])
        for row in rows:
            if not row.get("extra"):
                scalars = self._scalars(row).items()
                self._add_values(row["step"], [{"tag": tag, "simple_value": y} for tag, y in scalars])

    def histograms(self, step: int, arrays: Mapping[str, Array]) -> None:
        """Write the histogram of each array's finite values."""
        found = {name: self._histogram(array) for name, array in arrays.items()}
        self._add_values(step, [{"tag": name, "histo": made} for name, made in found.items() if made is not None])

    def sync(self) -> None:
        with self._lock, writing(self._path):
            fsync(self._descriptor)

    def close(self) -> None:
        with writing(self._path):
            os.close(self._descriptor)

    def _scalars(self, row: Row) -> dict[str, float]:
        folder = _FOLDERS.get(row["kind"], row["kind"])
        metrics = {name: value for name, value in row.items() if name not in _NO_METRIC}
        found = {f"{folder}/{name}": float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        if rate := row.get("samples_per_second"):
            found[f"{folder}/step_seconds"] = self._batch_size / rate
        return found

    def _histogram(self, array: Array) -> Any:
        values = array.reshape(-1)
        values = values if all_finite(values) else values[np.isfinite(values)]
        if not values.size:
            return None
        low, high = float(values.min()), float(values.max())
        if not math.isfinite(high - low):
            return None
        counts, edges = np.histogram(values, _BUCKETS, (np.float64(low), np.float64(high)))
        squares = np.einsum("i,i->", values, values, dtype=np.float64)
        return self._package.summary.HistogramProto(
            min=low,
            max=high,
            num=values.size,
            sum=values.sum(dtype=np.float64),
            sum_squares=squares,
            bucket_limit=edges[1:],
            bucket=counts,
        )

    def _add_values(self, step: int, values: Iterable[dict[str, Any]]) -> None:
        summary = self._package.summary.Summary
        self._add(step=step, summary=summary(value=[summary.Value(**value) for value in values]))

    def _add(self, **content: Any) -> None:
        event = self._package.event.Event(wall_time=self._clock(), **content)
        with writing(self._path):
            self._folder.check()
            self._records.write(event.SerializeToString())


class _Whole:
    # one write a record: what a kill leaves is whole records, and an error is seen where it happens
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, record: bytes) -> None:
        write_all(self._descriptor, record)


def _file_name(others: Iterable[str], segment: int) -> str:
    # read in the order of their names: the number comes first, as clocks and hosts may repeat or go back
    numbers = [int(match[1]) for name in others if (match := _NAME.fullmatch(name))]
    number = max([segment, *(1 + number for number in numbers)])
    return f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.segment-{segment}"
