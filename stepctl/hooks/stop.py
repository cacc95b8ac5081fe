"""Why a segment stops: its target, its time, or a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from stepctl.hooks.base import StopReason
from stepctl.state import Counters

_LOOK = 1.0  # seconds between two looks at the file system


class StopAtStep:
    """Asked before a step: at or past `last_step`, none is made."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        if counters.global_step >= self.last_step:
            return StopReason(f"last_step {self.last_step}", done=True, remedy="more: --num-steps N")
        return None


class TimeLimit:
    """Asked before a step: once `seconds` have passed since `began`, none is made any more, after a first one.

    So a job that is started again and again progresses, however long its start takes.
    """

    def __init__(self, seconds: float, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._began, self._clock = seconds, began, clock
        self._first_step: int | None = None

    @property
    def is_over(self) -> bool:
        """Tell whether the time has passed."""
        return self._clock() - self._began >= self.seconds

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        if self._first_step is None:
            self._first_step = counters.global_step
        if self.is_over and counters.global_step > self._first_step:
            return StopReason(f"max_time {self.seconds:g} s", done=False)
        return None


class StopFile:
    """Asked before a step: while a file stands at `path`, none is made; looked for at once, then once a second.

    Messages call it `shown`, which may be relative.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic, shown: Path | None = None) -> None:
        self.path, self._clock = path, clock
        self._shown = shown or path
        self._next, self._stands = float("-inf"), False

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        now = self._clock()
        if now >= self._next:
            # a file system that does not answer for once is no reason to stop
            self._next, self._stands = now + _LOOK, os.path.lexists(self.path)
        if not self._stands:
            return None
        return StopReason(f"file {self.path.name}", done=True, remedy=f"remove {self._shown} to go on")
