"""Training rows on the grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepctl.arena import Array
from stepctl.config import Log as LogConfig
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics
from stepctl.writers.rows import Rows


class Log(Hook):
    """Writes {"step": N, "kind": "train", ...} at the run's first step, on the grid, and marked extra at the end.

    The row of step N holds the metrics of the batch that produced N, and if asked mean_<metric> over the steps since
    the row before. The sums are in the checkpoint, so that a resume in between changes no row.
    """

    name = "log"

    def __init__(
        self,
        config: LogConfig,
        rows: Rows,
        metrics: Sequence[str],
        *,
        first_step: int,
        n_samples: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows, self._n_samples = rows, n_samples
        self._clock, self._since = clock, (0.0, 0)
        self._fires, self._means = config.trigger(also=first_step), config.means
        self.trigger = None if self._means else self._fires
        self._last_row = -1
        self._names = tuple(metrics)
        self._sums, self._counts = np.zeros(len(self._names)), np.zeros(len(self._names), np.int64)
        self._fast: Any = self._sums.data, self._counts.data  # the same memory, faster for single numbers

    def state(self) -> dict[str, Array]:
        return {"sums": self._sums, "counts": self._counts}

    def start(self, state: TrainState) -> None:
        self._since = (self._clock(), state.counters.samples_seen)
        if not self._means:
            self._forget()

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._means:
            self._add(metrics)
            if not self._fires(state.counters):
                return
        self._write(state, metrics)
        if self._means:
            self._forget()

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None and self._last_row != state.counters.global_step:
            self._write(state, metrics, extra=True)

    def _add(self, metrics: Metrics) -> None:
        sums, counts = self._fast
        for i, name in enumerate(self._names):
            if name in metrics:
                sums[i] += metrics[name]
                counts[i] += 1

    def _forget(self) -> None:
        self._sums[:], self._counts[:] = 0, 0

    def _write(self, state: TrainState, metrics: Metrics, **marks: bool) -> None:
        now, seen = self._clock(), state.counters.samples_seen
        then, before = self._since
        self._since, self._last_row = (now, seen), state.counters.global_step
        rate = (seen - before) / max(now - then, 1e-9)
        row = {"step": state.counters.global_step, "kind": "train", "epoch": seen // self._n_samples, **metrics}
        if self._means:
            found = zip(self._names, self._sums.tolist(), self._counts.tolist(), strict=True)
            row |= {f"mean_{name}": total / count for name, total, count in found if count}
        self._rows.add({**row, "samples_per_second": round(rate, 1), **marks})
