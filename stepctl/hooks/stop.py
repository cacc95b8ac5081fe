"""Stopping at a global step."""

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
