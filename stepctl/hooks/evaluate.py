"""Evaluation rows on the grid."""

from __future__ import annotations

from collections.abc import Sequence

from stepctl.config import Evaluate as EvaluateConfig
from stepctl.data.batches import EvaluationBatches
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics, Task
from stepctl.writers.base import Writer


class Evaluate(Hook):
    """Writes {"step": N, "kind": "eval", ...} on the grid; at a target off the grid too, marked extra."""

    name = "evaluate"

    def __init__(
        self, config: EvaluateConfig, task: Task, batches: EvaluationBatches, writers: Sequence[Writer]
    ) -> None:
        self._config, self._task, self._batches, self._writers = config, task, batches, writers

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._config.fires(state.counters.global_step):
            self._write(state)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None and reason.done and not self._config.fires(state.counters.global_step):
            self._write(state, extra=True)

    def _write(self, state: TrainState, **marks: bool) -> None:
        row = {"step": state.counters.global_step, "kind": "eval", **self._task.evaluate(state, self._batches)}
        for writer in self._writers:
            writer.write({**row, **marks})
