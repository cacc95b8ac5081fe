"""Checkpoints: on the grid, after so many seconds, when asked to, and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from stepctl.checkpoint.background import Background
from stepctl.config import Checkpoint as CheckpointConfig
from stepctl.errors import NonFiniteError, RunMovedError, StepctlError
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics


class Save(Hook):
    """Publishes in the background while training goes on; at the start and the end it waits. Never twice on one step.

    `publish` writes a state that nothing changes any more, and `flush`, on the training thread, what must be written
    before it. What `publish` raised is raised at the next step, or with `on_error: continue` said, and made good at
    the next save; `report` is called at each step up to the one that finds the publishing done. `waits` and
    `wait_seconds` are what training waited for a checkpoint that was still being written when the next was due.
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
        self._publish, self._flush, self._background = publish, flush, background
        self._requested, self._report, self._say, self._note, self._clock = requested, report, say, note, clock
        self._fires, self._seconds = config.trigger(), config.every_seconds
        self._stop_on_error = config.on_error == "stop"
        self._saved_step, self._target = saved_step, target
        self._saved_at = clock()
        self.saves, self.waits, self.wait_seconds = 0, 0, 0.0

    def start(self, state: TrainState) -> None:
        self.now(state)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._background.job is not None:
            self._settle(self._background.check)
            self._report()
        requested = self._requested()  # asked at every step, so that no request outlives its step
        if self._fires(state.counters) or requested or (self._seconds is not None and self._late(self._seconds)):
            step = state.counters.global_step
            # the target's own comes at the end, after the last rows: whoever finds it finds them
            if step not in (self._target, self._saved_step):
                self._wait(step)
                self._begin(state.hand_over())

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        self._settle(self._background.finish)
        self.now(state)

    def finish(self) -> None:
        """Wait until a save in flight is done; raise its error if it had one."""
        self._look(self._background.finish)

    def now(self, state: TrainState) -> None:
        """Publish this state, if that was not done, and wait until it is there."""
        self.finish()
        if state.counters.global_step != self._saved_step:
            self._begin(state.with_hooks_asked())
            self.finish()

    def _late(self, seconds: float) -> bool:
        return self._clock() - self._saved_at >= seconds

    def _begin(self, state: TrainState) -> None:
        self._flush()
        self._saved_step, self._saved_at = state.counters.global_step, self._clock()
        self.saves += 1
        self._background.start(lambda: self._publish(state))

    def _wait(self, step: int) -> None:
        if self._background.busy:
            began = self._clock()
            self._settle(self._background.finish)
            self.waits += 1
            self.wait_seconds += self._clock() - began
            if self.waits == 1:
                self._note(
                    f"note: at step {step} training waits for the checkpoint before it to be written (said once)"
                )

    def _settle(self, look: Callable[[], None]) -> None:
        try:
            self._look(look)
        except StepctlError as error:
            if self._stop_on_error or isinstance(error, NonFiniteError | RunMovedError):
                raise
            self._say(f"warning: {error}; the next save tries again")

    def _look(self, look: Callable[[], None]) -> None:
        try:
            look()
        except Exception:
            self._saved_step = None  # so that the next save makes it good
            raise
