"""Evaluation rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stepctl.config.model import EvaluateConfig
from stepctl.data.batches import Batch
from stepctl.errors import ConfigError
from stepctl.hooks.base import PeriodicHook
from stepctl.hooks.watch import MetricWatch
from stepctl.programs.base import Metrics, Task, as_numbers
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from stepctl.writers.row_buffer import RowBuffer


class Evaluate(PeriodicHook):
    """Writes {"step": N, "kind": "eval", ...} where the cadence fires, and updates the watches.

    At a target where the cadence does not fire, the row is marked extra and the watches are not
    updated.
    """

    name = "evaluate"
    essential = True  # a checkpoint includes its row and the state of the watches

    def __init__(
        self,
        config: EvaluateConfig,
        task: Task,
        batches: Iterable[Batch],
        rows: RowBuffer,
        watches: Sequence[MetricWatch] = (),
        named: Sequence[str] = (),
    ) -> None:
        """`named` are further metrics that must be returned."""
        super().__init__(config.cadence())
        self._config = config
        self._task = task
        self._batches = batches
        self._rows = rows
        self._watches = watches
        self._named = named
        self._last_step = -1

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        evaluated = self._evaluate(state)
        for watch in self._watches:
            watch.update(state.counters.global_step, evaluated)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None and reason.done and self._last_step != state.counters.global_step:
            self._evaluate(state, extra=True)

    def _evaluate(self, state: TrainState, **marks: bool) -> Metrics:
        self._rows.flush()  # before an evaluation, which may take long
        metrics = self._checked(self._task.evaluate(state, self._batches))
        if self._config.ema:
            averaged = self._checked(self._task.evaluate(state, self._batches, average=True))
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        self._check_watched(metrics)
        self._last_step = state.counters.global_step
        self._rows.add({"step": self._last_step, "kind": "eval", **metrics, **marks})
        return metrics

    def _checked(self, returned: Metrics) -> Metrics:
        metrics = as_numbers(returned, "task: evaluate returned")
        for name in self._task.metrics:
            if name not in metrics:
                raise ConfigError(
                    f"{type(self._task).__name__}.evaluate returned no {name!r}, which the task's "
                    f"metrics declare; it returned {', '.join(metrics) or 'nothing'}"
                )
        return metrics

    def _check_watched(self, metrics: Metrics) -> None:
        """Raise ConfigError if a metric that the config names is missing: a program declares none."""
        named = [*(watch.metric for watch in self._watches), *self._named]
        for name in named:
            if name and name not in metrics:
                raise ConfigError(
                    f"evaluate returned no {name!r}, which the config names; it returned "
                    f"{', '.join(metrics) or 'nothing'}"
                )
