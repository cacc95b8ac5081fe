"""Checkpoints: periodic, on request, and at the start and the end of a segment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from stepctl.checkpoint.background import Background
from stepctl.config.model import CheckpointConfig
from stepctl.errors import NonFiniteError, RunMovedError, StepctlError
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason

# A background thread reacquires the interpreter lock after each system call. On a virtual machine this
# costs the training thread about 0.4 ms each time, over 10 ms a save; writing a small file takes 3 ms.
AT_ONCE_BYTES = 1 << 16  # largest state that is written on the training thread
_AT_ONCE_SECONDS = 0.01  # a slower write, as on a slow disk, sends the next ones to the background
_N_IN_BACKGROUND = 10  # number of saves that a slow write sends there


class Save(Hook):
    """Publishes checkpoints, at most one a step, in the background; small ones at once.

    At the start and the end of a segment it waits until the checkpoint is durable.

    An error of `publish` is raised at the next step; with `on_error: continue` it is reported, and
    the next save retries. `waits` and `wait_seconds` count how often and how long training waited
    because the previous checkpoint was still being written.

    Args:
        publish: Writes a snapshot of the state, in the background thread or at once.
        flush: Writes what must precede the checkpoint, in the training thread.
        requested: Whether a save was requested, by a signal; called at every step.
        report: Reports durable checkpoints; called after each step during which a save was in
            flight.
        say: Shows a warning.
        note: Shows a note.
        saved_step: The step of the newest checkpoint, if there is one.
        target: The step whose checkpoint is left to `end`, because it must follow the last rows.
    """

    name = "save"

    def __init__(
        self,
        config: CheckpointConfig,
        publish: Callable[[TrainState], None],
        *,
        flush: Callable[[], None],
        background: Background,
        requested: Callable[[], bool],
        report: Callable[[], None],
        say: Callable[[str], None],
        note: Callable[[str], None],
        saved_step: int | None,
        target: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cadence = config.cadence()
        self._every_seconds = config.every_seconds
        self._stop_on_error = config.on_error == "stop"
        self._publish = publish
        self._flush = flush
        self._background = background
        self._requested = requested
        self._report = report
        self._say = say
        self._note = note
        self._saved_step = saved_step
        self._target = target
        self._clock = clock
        self._saved_at = clock()
        self._n_in_background = 0  # of the next saves
        self.saves = 0
        self.waits = 0
        self.wait_seconds = 0.0

    def start(self, state: TrainState) -> None:
        self.save_now(state)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._background.job is not None:
            self._report_errors(self._background.check)
            self._report()
        if self._is_due(state):
            step = state.counters.global_step
            if step not in (self._target, self._saved_step):
                self._wait_for_previous(step)
                self._publish_snapshot(state.snapshot())

    def due_step(self, step: int) -> float:
        if self._background.job is not None:  # its end is reported after the next step
            return step + 1
        return self._cadence.due_step(step)

    def due_time(self) -> float:
        return math.inf if self._every_seconds is None else self._saved_at + self._every_seconds

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        self._report_errors(self._background.finish)
        self.save_now(state)

    def wait(self) -> None:
        """Wait for the save in flight; raise its error if it failed."""
        self._raise_errors(self._background.finish)

    def save_now(self, state: TrainState) -> None:
        """Publish this state unless its step is saved already, and wait until it is durable."""
        self.wait()
        if state.counters.global_step != self._saved_step:
            self._begin(state.with_copies(), self._background.start)
            self.wait()

    def _is_due(self, state: TrainState) -> bool:
        # both are called: a request must not outlive its step
        fires = self._cadence.fires(state.counters)
        requested = self._requested()
        if fires or requested:
            return True
        if self._every_seconds is None:
            return False
        return self._clock() - self._saved_at >= self._every_seconds

    def _publish_snapshot(self, state: TrainState) -> None:
        if state.n_bytes > AT_ONCE_BYTES or self._n_in_background:
            self._n_in_background = max(self._n_in_background - 1, 0)
            self._begin(state, self._background.start)
            return
        self._begin(state, self._background.run)
        if self._clock() - self._saved_at > _AT_ONCE_SECONDS:
            self._n_in_background = _N_IN_BACKGROUND

    def _begin(self, state: TrainState, run: Callable[[Callable[[], None]], None]) -> None:
        self._flush()
        self._saved_step = state.counters.global_step
        self._saved_at = self._clock()
        self.saves += 1
        run(lambda: self._publish(state))

    def _wait_for_previous(self, step: int) -> None:
        if not self._background.busy:
            return
        started = self._clock()
        self._report_errors(self._background.finish)
        self.waits += 1
        self.wait_seconds += self._clock() - started
        if self.waits == 1:
            self._note(
                f"note: step {step} waits for the previous checkpoint to be written (shown once)"
            )

    def _report_errors(self, check: Callable[[], None]) -> None:
        """Call `check`; with `on_error: continue` report an error of a save, not raise it."""
        try:
            self._raise_errors(check)
        except StepctlError as error:
            if self._stop_on_error or isinstance(error, NonFiniteError | RunMovedError):
                raise
            self._say(f"warning: {error}; the next save retries")

    def _raise_errors(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception:
            self._saved_step = None  # the next save must not skip this step
            raise
