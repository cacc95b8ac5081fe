"""Evaluation rows on the grid."""

from __future__ import annotations

from collections.abc import Sequence

from stepctl.config import Evaluate as EvaluateConfig
from stepctl.data.batches import EvaluationBatches
from stepctl.errors import ConfigError
from stepctl.hooks.base import Hook, StopReason
from stepctl.hooks.watch import Watch
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics, Task, as_numbers
from stepctl.writers.rows import Rows


class Evaluate(Hook):
    """Writes {"step": N, "kind": "eval", ...} on the grid, and shows it to the watches.

    At a target off the grid it writes a row too, marked extra, and shows it to nobody.
    """

    name = "evaluate"
    essential = True  # for its rows, and what the watches remember

    def __init__(
        self,
        config: EvaluateConfig,
        task: Task,
        batches: EvaluationBatches,
        rows: Rows,
        watches: Sequence[Watch] = (),
    ) -> None:
        self._config, self._task, self._batches, self._rows = config, task, batches, rows
        self.trigger, self._watches = config.trigger(), watches
        self._last = -1

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        found = self._write(state)
        for watch in self._watches:
            watch.observe(state.counters.global_step, found)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None and reason.done and self._last != state.counters.global_step:
            self._write(state, extra=True)

    def _write(self, state: TrainState, **marks: bool) -> Metrics:
        self._rows.flush()  # this may take its time
        found = self._evaluate(state, average=False)
        if self._config.ema:
            averaged = self._evaluate(state, average=True)
            found |= {f"ema_{name}": value for name, value in averaged.items()}
        self._last = state.counters.global_step
        self._rows.add({"step": self._last, "kind": "eval", **found, **marks})
        return found

    def _evaluate(self, state: TrainState, *, average: bool) -> Metrics:
        if average:
            measured = self._task.evaluate(state, self._batches, average=True)
        else:
            measured = self._task.evaluate(state, self._batches)
        found = as_numbers(measured, "evaluate")
        missing = [name for name in self._task.metrics if name not in found]
        if missing:
            raise ConfigError(
                f"{type(self._task).__name__}.evaluate returned no {missing[0]!r}, which the task's metrics declare; "
                f"it returned {', '.join(found) or 'nothing'}"
            )
        return found
