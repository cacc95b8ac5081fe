"""Checkpoints on the grid."""

from __future__ import annotations

from collections.abc import Callable

from stepctl.config import Checkpoint as CheckpointConfig
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics


class Save(Hook):
    """Publishes at a fresh start, on the grid, when asked to, and at the end; never twice on one step."""

    name = "save"

    def __init__(
        self,
        config: CheckpointConfig,
        publish: Callable[[TrainState], None],
        requested: Callable[[], bool],
        saved_step: int | None,
        target: int,
    ) -> None:
        self._config, self._publish, self._requested = config, publish, requested
        self._saved_step, self._target = saved_step, target

    def start(self, state: TrainState) -> None:
        self._save(state)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        requested = self._requested()  # asked at every step, so that no request outlives its step
        step = state.counters.global_step
        # the target's own comes at the end, after the last rows: whoever finds it finds them
        if step != self._target and (requested or self._config.fires(step)):
            self._save(state)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        self._save(state)

    def _save(self, state: TrainState) -> None:
        if self._saved_step != state.counters.global_step:
            self._publish(state)
            self._saved_step = state.counters.global_step
