"""The protocol of a writer of metrics rows."""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepctl.system.files import fsync, write_all, write_errors

MetricsRow = dict[str, Any]  # {"step": N, "kind": "train" | "eval", metric: value, ...}
FIRST_KEYS = ("step", "kind", "extra")  # of a row, before the numbers
# the keys of a row that are not metrics
ROW_KEYS = frozenset({*FIRST_KEYS, "epoch", "samples_per_second", "steps_per_second"})


class Writer(ABC):
    """One destination of a segment's metrics rows."""

    @abstractmethod
    def write(self, rows: Sequence[MetricsRow]) -> None:
        """Write one or more rows, in order."""

    def sync(self) -> None:
        """Make the rows written so far durable; may be called from any thread."""
        return

    def close(self) -> None:
        """Release the destination; nothing is written afterwards."""
        return


class FileWriter(Writer):
    """A writer to one open file, which `write` may replace by another while it holds the lock."""

    def __init__(self, path: Path) -> None:
        """`path` is shown in messages."""
        self._path = path
        self._descriptor = -1
        self._is_synced = False
        self._lock = threading.Lock()  # `sync` runs in another thread

    def _append(self, data: bytes) -> None:
        """Write to the open file; not durable until `sync`."""
        try:
            write_all(self._descriptor, data)
        finally:
            self._is_synced = False  # after the write: `sync` may run at the same time

    def sync(self) -> None:
        with self._lock, write_errors(self._path):
            if self._is_synced:
                return
            self._is_synced = True
            try:
                fsync(self._descriptor)
            except OSError:
                self._is_synced = False
                raise

    def close(self) -> None:
        with write_errors(self._path):
            os.close(self._descriptor)
