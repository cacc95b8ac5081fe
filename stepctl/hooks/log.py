"""Training rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from stepctl.config.model import LogConfig
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from stepctl.writers.base import MetricsRow
from stepctl.writers.row_buffer import RowBuffer


class Log(Hook):
    """Writes {"step": N, "kind": "train", ...} at the run's first step and where the cadence fires.

    The row of step N holds the metrics of the batch that produced N. With `means` it also holds
    mean_<metric> over the steps since the previous row; their sums are saved in checkpoints, so
    that a resume does not change a row. The last step of a segment has a row marked extra if the
    cadence does not fire there. `n_samples`, of an epoch, is None in a run without data: its rows
    have the rate in steps.
    """

    name = "log"

    def __init__(
        self,
        config: LogConfig,
        rows: RowBuffer,
        metrics: Sequence[str],
        *,
        first_step: int,
        n_samples: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cadence = config.cadence(first_step)
        self._means = config.means
        self.trigger = None if self._means else self._cadence.fires  # means need every step
        self._rows = rows
        self._n_samples = n_samples
        self._clock = clock
        self._row_step = -1
        self._row_time = 0.0
        self._row_count = 0
        self._rate_column = "samples_per_second" if n_samples else "steps_per_second"
        self._names = tuple(metrics)
        self._sums = np.zeros(len(self._names))
        self._counts = np.zeros(len(self._names), np.int64)
        # the same memory: a memoryview is faster for single numbers
        self._sums_view: Any = self._sums.data
        self._counts_view: Any = self._counts.data

    def state(self) -> dict[str, Array]:
        return {"sums": self._sums, "counts": self._counts}

    def start(self, state: TrainState) -> None:
        self._row_time = self._clock()
        self._row_count = self._count(state.counters)
        if not self._means:
            self._reset_means()

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if not self._means:
            self._write(state, metrics)
            return
        self._add_to_means(metrics)
        if self._cadence.fires(state.counters):
            self._write(state, metrics)
            self._reset_means()

    def due_step(self, step: int) -> float:
        return step + 1 if self._means else self._cadence.due_step(step)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None and self._row_step != state.counters.global_step:
            self._write(state, metrics, extra=True)

    def _add_to_means(self, metrics: Metrics) -> None:
        sums = self._sums_view
        counts = self._counts_view
        for i, name in enumerate(self._names):
            if name in metrics:
                sums[i] += metrics[name]
                counts[i] += 1

    def _reset_means(self) -> None:
        self._sums[:] = 0
        self._counts[:] = 0

    def _write(self, state: TrainState, metrics: Metrics, **marks: bool) -> None:
        step = state.counters.global_step
        count = self._count(state.counters)
        now = self._clock()
        rate = (count - self._row_count) / max(now - self._row_time, 1e-9)
        self._row_step = step
        self._row_time = now
        self._row_count = count
        numbers = dict(metrics)  # a program may fill the same dict at its next step
        if self._means:
            numbers |= self._mean_metrics()
        self._rows.hold(partial(self._make_row, step, count, numbers, rate, marks))

    def _make_row(
        self, step: int, count: int, numbers: Metrics, rate: float, marks: dict[str, bool]
    ) -> MetricsRow:
        row: MetricsRow = {"step": step, "kind": "train"}
        if self._n_samples is not None:
            row["epoch"] = count // self._n_samples
        row |= numbers
        row[self._rate_column] = round(rate, 1)
        return row | marks

    def _count(self, counters: Counters) -> int:
        """Return the counter whose rate is shown."""
        return counters.global_step if self._n_samples is None else counters.samples_seen

    def _mean_metrics(self) -> dict[str, float]:
        sums = zip(self._names, self._sums.tolist(), self._counts.tolist(), strict=True)
        return {f"mean_{name}": total / count for name, total, count in sums if count}
