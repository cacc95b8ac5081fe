"""Training rows on the grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from stepctl.config import Log as LogConfig
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics
from stepctl.writers.base import Writer


class Log(Hook):
    """Writes {"step": N, "kind": "train", ...} at the run's first step, on the grid, and marked extra at the end.

    The row of step N holds the metrics of the batch that produced N.
    """

    name = "log"

    def __init__(
        self,
        config: LogConfig,
        writers: Sequence[Writer],
        *,
        first_step: int,
        n_samples: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._writers, self._first_step, self._n_samples = config, writers, first_step, n_samples
        self._clock, self._since = clock, (0.0, 0)
        self._last_row = -1

    def start(self, state: TrainState) -> None:
        self._since = (self._clock(), state.counters.samples_seen)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        step = state.counters.global_step
        if step == self._first_step or self._config.fires(step):
            self._write(state, metrics)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None and self._last_row != state.counters.global_step:
            self._write(state, metrics, extra=True)

    def _write(self, state: TrainState, metrics: Metrics, **marks: bool) -> None:
        now, seen = self._clock(), state.counters.samples_seen
        then, before = self._since
        self._since, self._last_row = (now, seen), state.counters.global_step
        rate = (seen - before) / max(now - then, 1e-9)
        row = {"step": state.counters.global_step, "kind": "train", "epoch": seen // self._n_samples}
        for writer in self._writers:
            writer.write({**row, **metrics, "samples_per_second": round(rate, 1), **marks})
