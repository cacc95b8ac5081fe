"""The stop rules of a segment: its target, its time limit, and a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from stepctl.state.counters import Counters
from stepctl.stopping.base import StopReason, StopRule

_CHECK_INTERVAL = 1.0  # seconds between two checks of the file system


class StopAtStep(StopRule):
    """Stops at or past a global step. `remedy` says how to make more steps."""

    def __init__(self, last_step: int, remedy: str = "more: --num-steps N") -> None:
        self.last_step = last_step
        self._remedy = remedy

    def reason(self, counters: Counters) -> StopReason | None:
        if counters.global_step < self.last_step:
            return None
        return StopReason(f"last_step {self.last_step}", done=True, remedy=self._remedy)

    def due_step(self, step: int) -> float:
        return self.last_step


class TimeLimit(StopRule):
    """Stops once `seconds` have passed since the time `began`, but after one step at least.

    A job that is restarted again and again thus makes progress, however long its start takes.
    """

    def __init__(
        self, seconds: float, began: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self._began = began
        self._clock = clock
        self._first_step: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether the time has passed."""
        return self._clock() - self._began >= self.seconds

    def reason(self, counters: Counters) -> StopReason | None:
        if self._first_step is None:
            self._first_step = counters.global_step
        if self.is_over and counters.global_step > self._first_step:
            return StopReason(f"max_time {self.seconds:g} s", done=False)
        return None

    def due_time(self) -> float:
        return self._began + self.seconds


class StopFile(StopRule):
    """Stops while a file exists; it is checked at the first step, then once a second.

    `shown` is its path in messages, which may be relative.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.monotonic, shown: Path | None = None
    ) -> None:
        self.path = path
        self._clock = clock
        self._shown = shown or path
        self._next_check = float("-inf")
        self._exists = False

    def reason(self, counters: Counters) -> StopReason | None:
        now = self._clock()
        if now >= self._next_check:
            self._next_check = now + _CHECK_INTERVAL
            # lexists: a file system that does not answer is no reason to stop
            self._exists = os.path.lexists(self.path)
        if not self._exists:
            return None
        return StopReason(
            f"file {self.path.name}", done=True, remedy=f"remove {self._shown} to continue"
        )

    def due_time(self) -> float:
        return self._next_check
