"""A buffer between the hooks that make metrics rows and the writers."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import final

from stepctl.errors import StepctlError
from stepctl.writers.base import MetricsRow, Writer

HOLD_SECONDS = 0.1


@final
class RowBuffer:
    """Collects rows and passes them to a segment's writers in batches.

    Training rows are held for up to HOLD_SECONDS: ten rows that are made and written together take
    little longer than one between two steps, when its code and data are not in the CPU's cache.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._flushed_at = float("-inf")
        self._writers: Sequence[Writer] = ()
        self._held: list[Callable[[], MetricsRow]] = []
        self._error: StepctlError | None = None

    def open(self, writers: Sequence[Writer]) -> None:
        """Start a segment with these writers."""
        self._writers = writers

    def add(self, row: MetricsRow) -> None:
        """Write one row, after the held ones."""
        self._held.append(lambda: row)
        self.flush()

    def hold(self, make_row: Callable[[], MetricsRow]) -> None:
        """Add a training row; `make_row` is called when it is written."""
        self._held.append(make_row)
        if self._clock() - self._flushed_at >= HOLD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the held rows. After an error, which may leave a partial line, each call fails."""
        if self._error is not None:
            raise self._error
        if not self._held:
            return
        rows = [make_row() for make_row in self._held]
        try:
            for writer in self._writers:
                writer.write(rows)
        except StepctlError as error:
            self._error = error
            raise
        except BaseException:
            self._error = StepctlError(
                "writing metrics rows was interrupted; close this run and resume it"
            )
            raise
        self._held = []
        self._flushed_at = self._clock()

    def sync(self) -> None:
        """Make the rows written so far durable; may be called from any thread."""
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        """End the segment; rows that cannot be written now are lost."""
        with contextlib.suppress(StepctlError):
            self.flush()
        for writer in self._writers:
            writer.close()
        self._writers = ()
        self._held = []
        self._error = None
