"""The loop.

    start -> [ stop? -> batch(samples_seen) -> step -> counters.advance -> after_step ] ... -> end

`start`, `after_step` and `end` are the hooks' events, in the hooks' order. The stop rule is asked before a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from stepctl.data.batches import TrainingBatches
from stepctl.errors import NonFiniteError, TornUpdate
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import SAMPLES_SEEN, Counters, TrainState
from stepctl.tasks.base import Metrics, Task

MAX_SKIPPED = 100  # batches in a row
_quiet = np.errstate(all="ignore")  # the guard says what is wrong, and once


class StopRule(Protocol):
    """Asked before every step."""

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""


class Trainer:
    """Moves a state forward, one update at a time; arrays and counters change in `step` and nowhere else.

    A batch whose loss or gradient is not finite makes no update and no step: with `skip` (it is told why) the
    next batch is taken, and without it NonFiniteError is raised. It counts as seen with the next step that is made,
    so that the state of a step is the same wherever a run is stopped after it. `complete` tells whether the state,
    and what the hooks remember, are those of a step that was made wholly.
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
        self.complete, self.skipped = False, 0
        self._in_a_row, self._passed_over = 0, 0  # batches, and their samples
        acting = [hook for hook in hooks if type(hook).after_step is not Hook.after_step]
        self._after_step = [(hook.trigger, hook.after_step) for hook in acting]

    @property
    def facts(self) -> dict[str, Any]:
        """What the ledger says of a segment at its end."""
        return {"skipped_batches": self.skipped} if self.skipped else {}

    def run(self) -> StopReason:
        """Train until a stop rule says why to stop; return that reason."""
        self.start()
        metrics = None
        while (reason := self.stop_reason()) is None:
            metrics = self.make_step() or metrics
        self.end(metrics, reason)
        return reason

    @_quiet
    def start(self) -> None:
        """Begin: tell the hooks."""
        for hook in self.hooks:
            hook.start(self.state)
        self.complete = True

    @_quiet
    def make_step(self) -> Metrics | None:
        """Make one update, and tell the hooks; None if its batch was skipped."""
        metrics = self._step()
        if metrics is not None:
            self.complete = False
            for fires, after_step in self._after_step:
                if fires is None or fires(self.state.counters):
                    after_step(self.state, metrics)
            self.complete = True
        return metrics

    @_quiet
    def end(self, metrics: Metrics | None, reason: StopReason) -> None:
        """Tell the hooks that it is over; `metrics` are the last step's."""
        self.complete = False
        for hook in self.hooks:
            hook.end(self.state, metrics, reason)

    @_quiet
    def step(self) -> Metrics | None:
        """Make one update, and count it once it is complete; None if the batch was skipped."""
        return self._step()

    def _step(self) -> Metrics | None:
        counters, whole = self.state.counters, self.complete
        batch = self.batches.batch(counters.samples_seen + self._passed_over)
        self.complete = False  # an interrupt may come anywhere
        try:
            metrics = self.task.step(self.state, batch)
        except TornUpdate:
            raise
        except NonFiniteError as error:
            self.complete = whole
            if self.skip is None or self._in_a_row == MAX_SKIPPED:
                raise
            self.skip(str(error))
            self.skipped += 1
            self._in_a_row += 1
            self._passed_over += self.batches.samples
            return None
        except Exception:
            self.complete = whole  # the state is as it was
            raise
        increments = self.task.increments(counters, self.batches.samples)
        increments[SAMPLES_SEEN] += self._passed_over
        self._in_a_row = self._passed_over = 0
        self._count(increments)
        self.complete = whole
        return metrics

    def _count(self, increments: Mapping[str, int]) -> None:
        self.state.counters.advance(increments)

    def stop_reason(self) -> StopReason | None:
        """Return why to stop now, or None."""
        counters = self.state.counters
        for rule in self.stop:
            if (why := rule.reason(counters)) is not None:
                return why
        return None
