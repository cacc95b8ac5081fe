"""Rows to several writers, some at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import final

from stepctl.errors import StepctlError
from stepctl.writers.base import Row, Writer

HOLD = 0.1  # seconds


@final
class Rows:
    """Hands rows to writers, which may be others in each segment.

    One that comes soon after others waits for more, at most HOLD seconds from the last that were written: ten rows
    written at once take little more than one. An evaluation's waits for none.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._flushed = clock, float("-inf")
        self._writers: Sequence[Writer] = ()
        self._held: list[Row] = []
        self._failed: StepctlError | None = None

    def open(self, writers: Sequence[Writer]) -> None:
        """Begin a segment."""
        self._writers = writers

    def add(self, row: Row) -> None:
        """Take one row."""
        self._held.append(row)
        if row["kind"] != "train" or self._clock() - self._flushed >= HOLD:
            self.flush()

    def flush(self) -> None:
        """Write what waits. What failed once always fails: a line that is half there must not be gone on with."""
        if self._failed is not None:
            raise self._failed
        if self._held:
            try:
                self._write()
            except StepctlError as error:
                self._failed = error
                raise
            except BaseException:
                self._failed = StepctlError("rows were broken off as they were written; close this run, and resume it")
                raise

    def _write(self) -> None:
        for writer in self._writers:
            writer.write(self._held)
        self._held = []
        self._flushed = self._clock()

    def sync(self) -> None:
        """Make every row that was written durable; for any thread."""
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        """End the segment; what cannot be written now is lost."""
        with contextlib.suppress(StepctlError):
            self.flush()
        for writer in self._writers:
            writer.close()
        self._writers, self._held, self._failed = (), [], None
