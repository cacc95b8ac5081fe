"""The loop.

    start -> [ stop? -> batch(samples_seen) -> step -> counters.advance -> after_step ] ... -> end

`start`, `after_step` and `end` are the hooks' events, in the hooks' order. The stop rule is asked before a step.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from stepctl.data.batches import Batch, TrainingBatches
from stepctl.errors import NonFiniteError, StepctlError, TornUpdate
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import SAMPLES_SEEN, Counters, TrainState, Trigger
from stepctl.tasks.base import Metrics, Task, as_numbers
from stepctl.tasks.read_only import explained
from stepctl.tasks.undo import Undo

MAX_SKIPPED = 100  # batches in a row
_nothing = contextlib.nullcontext()
_quiet = np.errstate(all="ignore")  # the guard says what is wrong, and once


class StopRule(Protocol):
    """Asked before every step."""

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""


class _Listener(NamedTuple):
    """What a trainer must know of a hook that listens to `after_step`."""

    essential: bool
    fires: Trigger | None
    after_step: Callable[[TrainState, Metrics], None]

    def tell(self, state: TrainState, metrics: Metrics) -> None:
        """Call the hook if its trigger fires."""
        if self.fires is None or self.fires(state.counters):
            self.after_step(state, metrics)


class Trainer:
    """Moves a state forward, one update at a time; arrays and counters change in `step` and nowhere else.

    A batch whose loss or gradient is not finite makes no update and no step: with `skip` (it is told why) the
    next batch is taken, and without it NonFiniteError is raised. It counts as seen with the next step that is made,
    so that the state of a step is the same wherever a run is stopped after it.

    `complete` tells whether the state, and what the hooks remember, are those of a whole step, so that they may be
    saved: also after an error, if nothing was changed before it. TornUpdate is raised in the place of an error that
    may have left the arrays half changed. `broken_off` tells that a KeyboardInterrupt came in the middle of a step:
    then no further step can be made.
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
        self.complete, self.broken_off, self.skipped = False, False, 0
        self._in_a_row, self._passed_over = 0, 0  # batches, and their samples
        self._arenas = {**state.arenas, "buffers": state.buffers}
        # an arena that is a task's own may be written at any time, unseen: also before it finds a batch to be skipped
        self._has_unseen_writes = any(not arena.read_only for arena in self._arenas.values())
        self._undo = Undo() if skip is not None and self._has_unseen_writes else None
        acting = [hook for hook in hooks if type(hook).after_step is not Hook.after_step]
        self._listeners = [_Listener(hook.essential, hook.trigger, hook.after_step) for hook in acting]

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
            with explained(self.state):
                hook.start(self.state)
        self.complete = True

    @_quiet
    def make_step(self) -> Metrics | None:
        """Make one update, and tell the hooks; None if its batch was skipped."""
        try:
            metrics = self._step()
            if metrics is not None:
                self._tell(metrics)
            return metrics
        except KeyboardInterrupt:
            self.broken_off = True
            raise

    def _tell(self, metrics: Metrics) -> None:
        """Tell the hooks of an update that is complete and counted."""
        self.complete = False
        state, told = self.state, 0
        try:
            with explained(state):
                for _, fires, after_step in self._listeners:
                    if fires is None or fires(state.counters):
                        after_step(state, metrics)
                    told += 1
        except KeyboardInterrupt:
            raise
        except BaseException:
            failed, *rest = self._listeners[told:]
            if not failed.essential:
                for listener in rest:
                    if listener.essential:
                        listener.tell(state, metrics)
                self.complete = True
            raise
        self.complete = True

    @_quiet
    def end(self, metrics: Metrics | None, reason: StopReason) -> None:
        """Tell the hooks that it is over; `metrics` are the last step's."""
        self.complete = False
        hooks = iter(self.hooks)
        try:
            with explained(self.state):
                for hook in hooks:
                    hook.end(self.state, metrics, reason)
        except KeyboardInterrupt:
            raise
        except BaseException:
            if not hook.essential:
                for other in hooks:
                    if other.essential:
                        other.end(self.state, metrics, reason)
                self.complete = True
            raise
        self.complete = True

    @_quiet
    def step(self) -> Metrics | None:
        """Make one update, and count it once it is complete; None if the batch was skipped."""
        return self._step()

    def _step(self) -> Metrics | None:
        counters, whole = self.state.counters, self.complete
        batch = self.batches.batch(counters.samples_seen + self._passed_over)
        for arena in self._arenas.values():
            arena.touched = False
        self.complete = False  # an interrupt may come anywhere
        try:
            metrics = self._task_step(batch)
        except TornUpdate:
            raise
        except BaseException as error:
            if self._may_be_torn():
                self._raise_torn(error)
            self.complete = whole  # the state is as it was
            if self.skip is None or self._in_a_row == MAX_SKIPPED or not isinstance(error, NonFiniteError):
                raise
            self.skip(str(error))
            self.skipped += 1
            self._in_a_row += 1
            self._passed_over += self.batches.samples
            return None
        increments = self.task.increments(counters, self.batches.samples)
        increments[SAMPLES_SEEN] += self._passed_over
        self._in_a_row = self._passed_over = 0
        self._count(increments)
        self.complete = whole
        return metrics

    def _task_step(self, batch: Batch) -> Metrics:
        with self._undo.on_error(self._arenas) if self._undo else _nothing, explained(self.state):
            return as_numbers(self.task.step(self.state, batch), "step")

    def _may_be_torn(self) -> bool:
        """Tell whether a step that failed may have changed arrays."""
        if any(arena.touched for arena in self._arenas.values()):
            return True
        return self._has_unseen_writes and self._undo is None

    def _raise_torn(self, error: BaseException) -> NoReturn:
        """Raise TornUpdate for an error in the middle of a step, which a message of one line will tell of."""
        # other ranks know the error that all have agreed on by its identity; an interrupt is no error
        if self.task.comm.rank > 0 or isinstance(error, KeyboardInterrupt):
            raise error
        what = str(error)
        if not isinstance(error, StepctlError):
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}:{at.lineno})"
        raise TornUpdate(f"step {self.state.counters.global_step + 1} failed in the middle: {what}") from error

    def _count(self, increments: Mapping[str, int]) -> None:
        self.state.counters.advance(increments)

    def stop_reason(self) -> StopReason | None:
        """Return why to stop now, or None."""
        counters = self.state.counters
        for rule in self.stop:
            if (why := rule.reason(counters)) is not None:
                return why
        return None
