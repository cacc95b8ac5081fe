"""The progress of a segment while it runs: a bar on a terminal, a line of text in a notebook."""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, final

from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_REFRESH = 0.1  # seconds


class ProgressDisplay(Hook):
    """Shows the global step, the first metric and the step rate, at most ten times a second."""

    name = "progress"

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown_at = float("-inf")

    def start(self, state: TrainState) -> None:
        self._start_step = state.counters.global_step
        self._started_at = self._clock()
        self.open(self._start_step)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._clock() - self._shown_at >= _REFRESH:
            self._show(state, metrics)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None:
            self._show(state, metrics)
        self.close()

    def _show(self, state: TrainState, metrics: Metrics) -> None:
        self._shown_at = self._clock()
        step = state.counters.global_step
        local_step = step - self._start_step
        rate = local_step / max(self._clock() - self._started_at, 1e-9)
        first_metric = next((f"  {name} {value:.4g}" for name, value in metrics.items()), "")
        self.update(step, f"(local {local_step}){first_metric}  {rate:,.4g} steps/s")

    @abstractmethod
    def open(self, step: int) -> None:
        """Appear, before the first step."""

    @abstractmethod
    def update(self, step: int, detail: str) -> None:
        """Show a step."""

    @abstractmethod
    def close(self) -> None:
        """Release the terminal; may be called again."""


@final
class ProgressBar(ProgressDisplay):
    """A bar on a terminal, with the remaining time."""

    def __init__(
        self,
        console: Console,
        *,
        title: str,
        target: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(clock=clock)
        self._progress = _progress(console, target)
        self._title = title
        self._target = target

    def open(self, step: int) -> None:
        self._bar = self._progress.add_task(
            self._title, total=self._target, completed=step, detail=""
        )
        with contextlib.suppress(OSError):
            self._progress.start()

    def update(self, step: int, detail: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            self._progress.update(self._bar, completed=step, detail=detail)
            self._progress.refresh()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()


@final
class ProgressLine(ProgressDisplay):
    """A line of text that `show` replaces, as a notebook can."""

    def __init__(
        self,
        show: Callable[[str], None],
        *,
        title: str,
        target: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(clock=clock)
        self._show_text = show
        self._title = title
        self._target = target

    def open(self, step: int) -> None:
        self.update(step, "")

    def update(self, step: int, detail: str) -> None:
        self._show_text(f"{self._title}: step {step}/{self._target} {detail}".rstrip())

    def close(self) -> None:
        return  # the last text stays


def _progress(console: Console, target: int) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    title = Column(max_width=12, no_wrap=True, overflow="ellipsis")
    steps = Column(no_wrap=True, min_width=2 * len(str(target)) + 1)
    detail = Column(ratio=3, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", table_column=title),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        MofNCompleteColumn(table_column=steps),
        TextColumn("{task.fields[detail]}", table_column=detail),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
        console=console,
        auto_refresh=False,
        expand=True,
    )
