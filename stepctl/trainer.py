"""The loop.

    start -> [ stop? -> batch(samples_seen) -> step -> counters.advance -> after_step ] ... -> end

`start`, `after_step` and `end` are the hooks' events, in the hooks' order. The stop rule is asked before a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stepctl.data.batches import TrainingBatches
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import Counters, TrainState
from stepctl.tasks.base import Metrics, Task


class StopRule(Protocol):
    """Asked before every step."""

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""


class Trainer:
    """Moves a state forward, one update at a time; arrays and counters change in `step` and nowhere else."""

    def __init__(
        self,
        task: Task,
        batches: TrainingBatches,
        state: TrainState,
        *,
        stop: Sequence[StopRule],
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.task, self.batches, self.state = task, batches, state
        self.stop, self.hooks = stop, hooks

    def run(self) -> StopReason:
        """Train until a stop rule says why to stop; return that reason."""
        for hook in self.hooks:
            hook.start(self.state)
        metrics = None
        while (reason := self._stop_reason()) is None:
            metrics = self.step()
            for hook in self.hooks:
                hook.after_step(self.state, metrics)
        for hook in self.hooks:
            hook.end(self.state, metrics, reason)
        return reason

    def step(self) -> Metrics:
        """Make one update, and count it once it is complete."""
        batch = self.batches.batch(self.state.counters.samples_seen)
        metrics = self.task.step(self.state, batch)
        self.state.counters.advance(self.task.increments(batch))
        return metrics

    def _stop_reason(self) -> StopReason | None:
        return next((why for rule in self.stop if (why := rule.reason(self.state.counters))), None)
