"""A progress bar on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stepctl.hooks.base import Hook, StopReason
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics

if TYPE_CHECKING:
    from rich.console import Console

_REFRESH = 0.1  # seconds


class ProgressBar(Hook):
    """Shows the global step from the resumed position on, the first metric, and this segment's rate and time left."""

    name = "progress"

    def __init__(
        self, console: Console, *, title: str, target: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self._clock, self._title, self._target, self._shown = clock, title, target, float("-inf")
        columns = (
            TextColumn("{task.description}", table_column=Column(max_width=12, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(target)) + 1)),
            TextColumn("{task.fields[detail]}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
        )
        self._progress = Progress(*columns, console=console, auto_refresh=False, expand=True)

    def start(self, state: TrainState) -> None:
        step = state.counters.global_step
        self._first, self._began = step, self._clock()
        self._bar = self._progress.add_task(self._title, total=self._target, completed=step, detail="")
        with contextlib.suppress(OSError):
            self._progress.start()

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._clock() - self._shown >= _REFRESH:
            self._show(state, metrics)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None:
            self._show(state, metrics)
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        with contextlib.suppress(OSError):
            self._progress.stop()

    def _show(self, state: TrainState, metrics: Metrics) -> None:
        self._shown = self._clock()
        step = state.counters.global_step
        local = step - self._first
        first = next((f"  {name} {value:.4g}" for name, value in metrics.items()), "")
        rate = local / max(self._clock() - self._began, 1e-9)
        detail = f"(local {local}){first}  {rate:,.4g} steps/s"
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._progress.update(self._bar, completed=step, detail=detail)
            self._progress.refresh()
