"""Why a segment stops: its target, or its time."""

from __future__ import annotations

import time
from collections.abc import Callable

from stepctl.hooks.base import StopReason
from stepctl.state import Counters


class StopAtStep:
    """Asked before a step: at or past `last_step`, none is made."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        if counters.global_step >= self.last_step:
            return StopReason(f"last_step {self.last_step}", done=True)
        return None


class TimeLimit:
    """Asked before a step: once `seconds` have passed since `began`, none is made any more."""

    def __init__(self, seconds: float, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._began, self._clock = seconds, began, clock

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        if self._clock() - self._began >= self.seconds:
            return StopReason(f"max_time {self.seconds:g} s", done=False)
        return None
