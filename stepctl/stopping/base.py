"""Stop rules, and the reason that ends a segment."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

from stepctl.state.counters import Counters


class StopReason(NamedTuple):
    """Why a segment ends.

    `done` is false for an interruption; `remedy` is the way to continue anyway.
    """

    text: str
    done: bool
    remedy: str = ""

    def describe_nothing_to_do(self, step: int, target: int) -> str:
        """Return the message of a resume that makes no step."""
        why = self.remedy
        if step < target:
            why = "; ".join(filter(None, (self.text, self.remedy)))
        return f"at global step {step}, target {target}: nothing to do ({why})"


class StopRule(ABC):
    """A condition that is checked before a step.

    It is checked before the first step, when it is due, after a signal, and after a hook or a
    script requested a stop.
    """

    @abstractmethod
    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""

    def due_step(self, step: int) -> float:
        """Return the first global step after `step` that needs a check; by default infinity."""
        return math.inf

    def due_time(self) -> float:
        """Return the time.monotonic() from which a check is needed; by default infinity."""
        return math.inf


def first_reason(rules: Iterable[StopRule], counters: Counters) -> StopReason | None:
    """Return the first rule's reason to stop now; None if no rule has one."""
    for rule in rules:
        reason = rule.reason(counters)
        if reason is not None:
            return reason
    return None
