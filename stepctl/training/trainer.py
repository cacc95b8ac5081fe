"""The training loop.

    start -> [ stop? -> batch(samples_seen) -> update -> counters.advance -> after_step ] ... -> end

`start`, `after_step` and `end` are the hooks' events, in the hooks' order. Stop rules are checked
before a step. A rule or a hook is called only when it is due (`due_step`, `due_time`): calling each
of them at every step would take a few percent of the time of a small step.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from stepctl.data.batches import Batch, Batches
from stepctl.errors import ConfigError, NonFiniteError, StepctlError, TornUpdate
from stepctl.hooks.base import Hook
from stepctl.hooks.stop_request import HookStop
from stepctl.programs.base import Metrics, Task, as_numbers
from stepctl.programs.undo import Undo
from stepctl.state.counters import SAMPLES_SEEN
from stepctl.state.read_only import explain_read_only
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason, StopRule, first_reason
from stepctl.system.text import in_one_line
from stepctl.system.user_code import describe_with_type, user_location
from stepctl.training.agenda import Agenda

MAX_SKIPPED = 100  # consecutive batches
_no_undo = contextlib.nullcontext()
_quiet = np.errstate(all="ignore")  # non-finite values are reported by the checks, once


class Update(NamedTuple):
    """A complete update of the arrays: its metrics, and by how much each counter rises."""

    metrics: Metrics
    increments: dict[str, int]


class Lead(Protocol):
    """Rank 0's link to the ranks that make every step together with it."""

    def receive_signals(self) -> None:
        """Collect the signals that other ranks received."""

    def order_step(self) -> None:
        """Order the other ranks to make a step."""


class Trainer:
    """Advances a state, one update at a time; arrays and counters change in `step` alone.

    A batch whose loss or gradient is not finite makes no update and no step. With `skip`, which is
    called with the reason, the next batch is used; without it NonFiniteError is raised. A skipped
    batch counts as seen with the next step that is made, so that the state of a step is the same
    wherever a run stops after it.

    `hook_stop` receives the reasons to stop that hooks return; it should be one of the stop rules.
    `signalled` tells whether a signal is pending that a stop rule or a hook handles.

    `complete` tells whether the state and the hooks' arrays belong to a completed step, so that they
    may be saved; it is true after an error that came before the first change. TornUpdate replaces
    an error that may have left the arrays half changed. `interrupted_in_step` tells that a
    KeyboardInterrupt came inside a step: no further step can be made. `last_metrics` are the last
    update's. While `is_due` is false, no stop rule has a reason.
    """

    def __init__(
        self,
        task: Task,
        batches: Batches,
        state: TrainState,
        *,
        stop: Sequence[StopRule],
        hooks: Sequence[Hook] = (),
        hook_stop: HookStop | None = None,
        skip: Callable[[str], None] | None = None,
        lead: Lead | None = None,
        signalled: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.task = task
        self.batches = batches
        self.state = state
        self.complete = False
        self.interrupted_in_step = False
        self.last_metrics: Metrics | None = None
        self._hooks = hooks
        self._hook_stop = hook_stop or HookStop()
        self._skip = skip
        self._lead = lead
        self._signalled = signalled
        self._clock = clock
        self._skipped = 0
        self._skipped_in_a_row = 0
        self._skipped_samples = 0  # since the last update
        self._arenas = {**state.arenas, "buffers": state.buffers}
        # a writable arena, and a program's state, may change unseen, even before a batch is skipped
        self._has_unseen_writes = state.program is not None or any(
            not arena.read_only for arena in self._arenas.values()
        )
        self._undo = Undo() if skip is not None and self._has_unseen_writes else None
        self._explain_read_only = explain_read_only(state)
        self._listeners = Agenda(
            hook for hook in hooks if type(hook).after_step is not Hook.after_step
        )
        self._rules = Agenda(stop)
        self._is_check_requested = False
        self.is_due = True
        # when the first listener or rule is due
        self._due_step = -math.inf
        self._due_time = math.inf

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the steps for the segment's last ledger line."""
        return {"skipped_batches": self._skipped} if self._skipped else {}

    def run(self) -> StopReason:
        """Train until a stop rule gives a reason, and return it; call the hooks' start and end."""
        self.start()
        reason = self.train()
        assert reason is not None
        self.end(reason)
        return reason

    @_quiet
    def train(
        self, n_updates: int | None = None, interrupted: Callable[[], bool] = lambda: False
    ) -> StopReason | None:
        """Make updates until a stop rule gives a reason, and return it.

        None if it ended for another reason: `n_updates` are made, or `interrupted` became true.
        """
        made = 0
        # the caller may have changed anything
        self.is_due = True
        self.request_check()
        self._listeners.make_all_due()
        while (n_updates is None or made < n_updates) and not interrupted():
            if self._lead is not None:
                self._lead.receive_signals()
                self.is_due |= self._signalled()
            if self.is_due:
                reason = self.stop_reason()
                if reason is not None:
                    return reason
            if self._lead is not None:
                self._lead.order_step()
            if self._make_step() is not None:
                made += 1
            else:
                self.request_check()
                self.is_due = True
        return None

    def stop_reason(self) -> StopReason | None:
        """Return why to stop now, or None; compute when a rule or a hook is due next."""
        if self._is_check_requested or self._signalled():
            self._is_check_requested = False
            self._rules.make_all_due()
        counters = self.state.counters
        due = self._rules.take_due(counters.global_step, self._clock())
        reason = first_reason(due, counters)
        if reason is not None:
            return reason
        self._due_step = min(self._listeners.step, self._rules.step)
        self._due_time = min(self._listeners.time, self._rules.time)
        return None

    def request_check(self) -> None:
        """Have all stop rules checked after the step in flight, although none may be due."""
        self._is_check_requested = True

    @_quiet
    def start(self) -> None:
        """Call the hooks' `start`."""
        for hook in self._hooks:
            with self._explain_read_only:
                hook.start(self.state)
        self.complete = True

    @_quiet
    def step(self) -> Metrics | None:
        """Make one update, count it, call the hooks; return its metrics, None if it was skipped."""
        return self._make_step()

    def _make_step(self) -> Metrics | None:
        was_complete = self.complete
        try:
            update = self._update()
            if update is None:
                return None
            self.complete_update(update, was_complete=was_complete)
            return update.metrics
        except KeyboardInterrupt:
            self.interrupted_in_step = True
            raise

    def complete_update(self, update: Update, *, was_complete: bool = True) -> None:
        """Count an update whose arrays are changed, and call the hooks."""
        self.state.counters.advance(update.increments)
        self.complete = was_complete
        self.last_metrics = update.metrics
        signalled = self._signalled()
        if signalled:
            self._listeners.make_all_due()
        self.is_due = (
            signalled
            or self._is_check_requested
            or self.state.counters.global_step >= self._due_step
            or self._clock() >= self._due_time
        )
        if self.is_due:
            self._call_listeners(update.metrics)
        else:
            self.complete = True

    @_quiet
    def end(self, reason: StopReason) -> None:
        """Call the hooks' `end`."""
        self.complete = False  # an interrupt may come anywhere
        hooks = iter(self._hooks)
        try:
            with self._explain_read_only:
                for hook in hooks:
                    hook.end(self.state, self.last_metrics, reason)
        except KeyboardInterrupt:
            raise
        except BaseException:
            if not hook.essential:
                for other in hooks:
                    if other.essential:
                        other.end(self.state, self.last_metrics, reason)
                self.complete = True
            raise
        self.complete = True

    def _call_listeners(self, metrics: Metrics) -> None:
        """Call the hooks that are due after an update.

        When a hook that is not essential fails, the essential ones are still called.
        """
        self.complete = False
        due = self._listeners.take_due(self.state.counters.global_step, self._clock())
        try:
            with self._explain_read_only:
                for hook in due:
                    self._call(hook, metrics)
        except KeyboardInterrupt:
            raise
        except BaseException:
            if not hook.essential:
                for other in due:
                    if other.essential:
                        self._call(other, metrics)
                self.complete = True
            raise
        self.complete = True

    def _call(self, hook: Hook, metrics: Metrics) -> None:
        if hook.trigger is None or hook.trigger(self.state.counters):
            reason = hook.after_step(self.state, metrics)
            if reason is not None:
                self._request_stop(hook.name, reason)

    def _request_stop(self, hook: str, reason: object) -> None:
        """Stop before the next step because a hook returned a reason; ConfigError if it is no text."""
        if not isinstance(reason, str) or not reason.strip("\0 "):
            raise ConfigError(
                f"hook {hook}: after_step returned {in_one_line(repr(reason), 60)}; return None, or "
                "the reason to stop as text"
            )
        self._hook_stop.request(hook, reason)
        self.request_check()

    def _update(self) -> Update | None:
        """Update the arrays from one batch; None if it was skipped.

        `complete` is false after an update, until it is counted.
        """
        counters = self.state.counters
        was_complete = self.complete
        batch = self.batches.batch(counters.samples_seen + self._skipped_samples)
        for arena in self._arenas.values():
            arena.modified = False
        self.complete = False  # an interrupt may come anywhere
        try:
            metrics = self._task_step(batch)
        except TornUpdate:
            raise
        except BaseException as error:
            if self._may_be_torn():
                self._raise_torn(error)
            self.complete = was_complete
            if not isinstance(error, NonFiniteError) or not self._skip_batch(error):
                raise
            return None
        increments = self.task.increments(counters, self.batches.samples)
        increments[SAMPLES_SEEN] += self._skipped_samples
        self._skipped_in_a_row = 0
        self._skipped_samples = 0
        return Update(metrics, increments)

    def _task_step(self, batch: Batch) -> Metrics:
        undo = self._undo.on_error(self._arenas) if self._undo else _no_undo
        with undo, self._explain_read_only:
            return as_numbers(self.task.step(self.state, batch), "task: step returned")

    def _skip_batch(self, error: NonFiniteError) -> bool:
        """Skip a non-finite batch; return False if this run may not, or skipped too many."""
        if self._skip is None or self._skipped_in_a_row == MAX_SKIPPED:
            return False
        self._skip(str(error))
        self._skipped += 1
        self._skipped_in_a_row += 1
        self._skipped_samples += self.batches.samples
        return True

    def _may_be_torn(self) -> bool:
        """Tell whether a failed update may have changed arrays."""
        if any(arena.modified for arena in self._arenas.values()):
            return True
        return self._has_unseen_writes and self._undo is None

    def _raise_torn(self, error: BaseException) -> NoReturn:
        """Raise TornUpdate, with one line about an error inside an update."""
        # ranks recognise an agreed error by its identity; an interrupt is no error
        if self.task.comm.rank > 0 or isinstance(error, KeyboardInterrupt):
            raise error
        text = str(error)
        if not isinstance(error, StepctlError):
            text = describe_with_type(error)
            if not user_location(error):
                frame = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{text} ({os.path.basename(frame.filename)}:{frame.lineno})"
        step = self.state.counters.global_step + 1
        raise TornUpdate(f"step {step} failed halfway: {text}") from error
