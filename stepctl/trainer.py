"""The loop.

    start -> [ stop? -> batch(samples_seen) -> step -> counters.advance -> after_step ] ... -> end

`start`, `after_step` and `end` are the hooks' events, in the hooks' order. The stop rule is asked before a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from stepctl.data.batches import TrainingBatches
from stepctl.errors import NonFiniteError, TornUpdate
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import SAMPLES_SEEN, Counters, TrainState
from stepctl.tasks.base import Metrics, Task

MAX_SKIPPED = 100  # batches in a row


class StopRule(Protocol):
    """Asked before every step."""

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""


class Trainer:
    """Moves a state forward, one update at a time; arrays and counters change in `step` and nowhere else.

    A batch whose loss or gradient is not finite makes no update and no step: with `skip` (it is told why) the
    next batch is taken, and without it NonFiniteError is raised. `complete` tells whether the state, and what
    the hooks remember, are those of a step that was made wholly.
    """

    def __init__(
        self,
        task: Task,
        batches: TrainingBatches,
        state: TrainState,
        *,
        stop: Sequence[StopRule],
        hooks: Sequence[Hook] = (),
        skip: Callable[[str], None] | None = None,
    ) -> None:
        self.task, self.batches, self.state = task, batches, state
        self.stop, self.hooks, self.skip = stop, hooks, skip
        self.complete, self.skipped, self._in_a_row = False, 0, 0

    @np.errstate(all="ignore")  # the guard says what is wrong, and once
    def run(self) -> StopReason:
        """Train until a stop rule says why to stop; return that reason."""
        for hook in self.hooks:
            hook.start(self.state)
        self.complete = True
        metrics = None
        while (reason := self._stop_reason()) is None:
            made = self.step()
            if made is None:
                continue
            metrics = made
            self.complete = False
            for hook in self.hooks:
                hook.after_step(self.state, metrics)
            self.complete = True
        self.complete = False
        for hook in self.hooks:
            hook.end(self.state, metrics, reason)
        return reason

    @np.errstate(all="ignore")
    def step(self) -> Metrics | None:
        """Make one update, and count it once it is complete; None if the batch was skipped."""
        batch = self.batches.batch(self.state.counters.samples_seen)
        try:
            metrics = self.task.step(self.state, batch)
        except TornUpdate:
            self.complete = False
            raise
        except NonFiniteError as error:
            if self.skip is None or self._in_a_row == MAX_SKIPPED:
                raise
            self.skip(str(error))
            self.skipped += 1
            self._in_a_row += 1
            self.state.counters.advance({SAMPLES_SEEN: len(batch.x)})
            return None
        self._in_a_row = 0
        self.state.counters.advance(self.task.increments(batch))
        return metrics

    def _stop_reason(self) -> StopReason | None:
        return next((why for rule in self.stop if (why := rule.reason(self.state.counters))), None)
