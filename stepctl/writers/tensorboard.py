"""Metrics rows as TensorBoard events, without TensorFlow and without a thread."""

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, final

import numpy as np

from stepctl.state.arena import Array, all_finite
from stepctl.system.files import write_errors
from stepctl.system.folder import Folder
from stepctl.system.optional import require
from stepctl.writers.base import FIRST_KEYS, FileWriter, MetricsRow

_FILE_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{10})\..*")
_TAG_FOLDERS = {"train": "train", "eval": "validation"}  # by the kind of a row
_N_BUCKETS = 30


def load() -> tuple[Any, Any, Any]:
    """Import the modules that write event files; ConfigError with the pip command without them."""
    return (
        require("tensorboard.compat.proto.event_pb2", "tensorboard"),
        require("tensorboard.compat.proto.summary_pb2", "tensorboard"),
        require("tensorboard.summary.writer.record_writer", "tensorboard"),
    )


@final
class TensorBoard(FileWriter):
    """Writes an event file a segment to tensorboard/: `train/loss`, `validation/loss`, ...

    Each file starts with a session-start mark at step `start` + 1, from which a viewer discards the
    points of earlier segments. Rows marked extra are not written: a resume removes them, and a mark
    cannot discard a single point at the restored step.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        segment: int,
        start: int,
        batch_size: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(folder.display_path)
        self._events, self._summaries, self._record_writer = load()
        self._folder = folder
        self._segment = segment
        self._batch_size = batch_size
        self._clock = clock
        self._open_file(start + 1)

    def write(self, rows: Sequence[MetricsRow]) -> None:
        if rows and not self._folder.is_open_file(self._path.name, self._descriptor):
            with self._lock:  # the file was deleted: start another
                os.close(self._descriptor)
                self._open_file(rows[0]["step"])
        for row in rows:
            if not row.get("extra"):
                scalars = self._scalars(row).items()
                values = [{"tag": tag, "simple_value": value} for tag, value in scalars]
                self._add_summary(row["step"], values)

    def write_histograms(self, step: int, arrays: Mapping[str, Array]) -> None:
        """Write a histogram of each array's finite values."""
        values = []
        for name, array in arrays.items():
            histogram = self._histogram(array)
            if histogram is not None:
                values.append({"tag": name, "histo": histogram})
        self._add_summary(step, values)

    def _open_file(self, first_step: int) -> None:
        folder = self._folder
        with write_errors(folder.display_path):
            folder.create()
            self._path = folder.display_path / _file_name(folder.names(), self._segment)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._descriptor = folder.open(self._path.name, flags)
            folder.sync()
        # it makes one write call a record: a kill leaves whole records
        self._records = self._record_writer.RecordWriter(SimpleNamespace(write=self._append))
        self._add_event(file_version="brain.Event:2")
        session_log = self._events.SessionLog
        self._add_event(step=first_step, session_log=session_log(status=session_log.START))

    def _scalars(self, row: MetricsRow) -> dict[str, float]:
        folder = _TAG_FOLDERS.get(row["kind"], row["kind"])
        scalars = {}
        for name, value in row.items():
            if name not in FIRST_KEYS and isinstance(value, int | float):
                scalars[f"{folder}/{name}"] = float(value)
        if row.get("samples_per_second"):
            scalars[f"{folder}/step_seconds"] = self._batch_size / row["samples_per_second"]
        if row.get("steps_per_second"):
            scalars[f"{folder}/step_seconds"] = 1 / row["steps_per_second"]
        return scalars

    def _histogram(self, array: Array) -> Any:
        values = array.reshape(-1)
        if not all_finite(values):
            values = values[np.isfinite(values)]
        if not values.size:
            return None
        low = float(values.min())
        high = float(values.max())
        if not math.isfinite(high - low):
            return None
        counts, edges = np.histogram(values, _N_BUCKETS, (np.float64(low), np.float64(high)))
        return self._summaries.HistogramProto(
            min=low,
            max=high,
            num=values.size,
            sum=values.sum(dtype=np.float64),
            sum_squares=np.einsum("i,i->", values, values, dtype=np.float64),
            bucket_limit=edges[1:],
            bucket=counts,
        )

    def _add_summary(self, step: int, values: Iterable[dict[str, Any]]) -> None:
        summary = self._summaries.Summary
        self._add_event(
            step=step, summary=summary(value=[summary.Value(**value) for value in values])
        )

    def _add_event(self, **fields: Any) -> None:
        event = self._events.Event(wall_time=self._clock(), **fields)
        with write_errors(self._path):
            self._folder.check_not_moved()
            self._records.write(event.SerializeToString())


def _file_name(existing: Iterable[str], segment: int) -> str:
    """Return a name that sorts after the existing ones: viewers read files in name order."""
    number = segment  # a clock's time is not reliable: clocks differ between hosts and can go back
    for name in existing:
        match = _FILE_NAME.fullmatch(name)
        if match is not None:
            number = max(number, int(match[1]) + 1)
    host = os.uname().nodename
    return f"events.out.tfevents.{number:010d}.{host}.{os.getpid()}.segment-{segment}"
