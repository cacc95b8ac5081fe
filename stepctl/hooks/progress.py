"""The progress of a segment while it runs: a bar on a terminal, in a notebook an output cell."""

from __future__ import annotations

import contextlib
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, final

from stepctl.hooks.base import TimedHook
from stepctl.programs.base import Metrics
from stepctl.state.counters import SAMPLES_SEEN, Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from stepctl.system.text import local_step_note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_REFRESH = 0.1  # seconds
_MIN_BAR = 6  # characters
_MAX_BAR = 40
_MAX_TITLE = 20
_CTRL_C = 3  # columns at the end of the line: a terminal shows "^C" there


class Progress(NamedTuple):
    """The progress of a segment after one of its steps.

    `rate` is in samples or steps a second, since the segment's start, None at its start.
    """

    title: str
    step: int
    target: int
    start: int = 0
    metric: str = ""
    rate: float | None = None
    unit: str = "steps"
    seconds_left: float | None = None

    @property
    def fraction(self) -> float:
        """The part of all steps to the target that is completed, from 0 to 1."""
        return min(self.step / self.target, 1.0) if self.target else 1.0

    def parts(self) -> dict[str, str]:
        """Return the texts to show, in order; "" where there is nothing yet."""
        rate = ""
        if self.rate is not None:
            rate = f"{self.rate:,.{0 if self.rate >= 10 else 2}f} {self.unit}/s"
        left = "" if self.seconds_left is None else f"{_clock(self.seconds_left)} left"
        return {
            "title": _shortened(self.title),
            "percentage": f"{int(100 * self.fraction)} %",
            "step": f"{self.step:>{len(str(self.target))}}/{self.target}",
            "local": local_step_note(self.step, self.start).strip(),
            "metric": self.metric,
            "rate": rate,
            "left": left,
        }


# the parts in the order in which a line that becomes wider has room for them
_PRIORITY = ("step", "percentage", "left", "metric", "rate", "title", "local")


def fitting_parts(parts: dict[str, int], width: int) -> list[str]:
    """Return the parts, by name and width, that fit into a line beside a bar; the first two always."""
    chosen: list[str] = []
    used = 0
    for name in _PRIORITY:
        needed = parts[name] + 2
        if parts[name] and (len(chosen) < 2 or used + needed + _MIN_BAR <= width):
            chosen.append(name)
            used += needed
    return [name for name in parts if name in chosen]


class ProgressDisplay(TimedHook):
    """Shows a segment's progress, at most every `refresh` seconds."""

    name = "progress"

    def __init__(
        self,
        *,
        title: str,
        target: int,
        clock: Callable[[], float] = time.monotonic,
        refresh: float = _REFRESH,
    ) -> None:
        self._title = title
        self._target = target
        self._clock = clock
        self._refresh = refresh
        self._shown_at = float("-inf")

    def start(self, state: TrainState) -> None:
        self._start_step = state.counters.global_step
        self._start_samples = _samples(state.counters)
        self._started_at = self._clock()
        self.open(Progress(self._title, self._start_step, self._target, self._start_step))

    def due_time(self) -> float:
        return self._shown_at + self._refresh

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._clock() - self._shown_at >= self._refresh:
            self._show(state, metrics)

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if metrics is not None:
            self._show(state, metrics)
        self.close()

    def _show(self, state: TrainState, metrics: Metrics) -> None:
        now = self._clock()
        self._shown_at = now
        seconds = max(now - self._started_at, 1e-9)
        step = state.counters.global_step
        n_steps = step - self._start_step
        n_samples = _samples(state.counters) - self._start_samples
        self.update(
            Progress(
                title=self._title,
                step=step,
                target=self._target,
                start=self._start_step,
                metric=next((f"{name} {value:.4g}" for name, value in metrics.items()), ""),
                rate=(n_samples or n_steps) / seconds,
                unit="samples" if n_samples else "steps",
                seconds_left=max(self._target - step, 0) * seconds / max(n_steps, 1),
            )
        )

    @abstractmethod
    def open(self, progress: Progress) -> None:
        """Appear, before the first step."""

    @abstractmethod
    def update(self, progress: Progress) -> None:
        """Show a step."""

    @abstractmethod
    def close(self) -> None:
        """Release the terminal; may be called again."""


@final
class ProgressBar(ProgressDisplay):
    """A bar on a terminal, with percentage and remaining time; it is erased at the end."""

    def __init__(
        self,
        console: Console,
        *,
        title: str,
        target: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.live import Live

        super().__init__(title=title, target=target, clock=clock)
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._widths: dict[str, int] = {}  # the largest of each part, so that the line stands still

    def open(self, progress: Progress) -> None:
        with contextlib.suppress(OSError):
            self._live.start()
        self.update(progress)

    def update(self, progress: Progress) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            self._live.update(self._line(progress), refresh=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()

    def _line(self, progress: Progress) -> Table:
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width - _CTRL_C
        parts = progress.parts()
        for name, text in parts.items():
            self._widths[name] = max(self._widths.get(name, 0), cell_len(text))
        names = fitting_parts(self._widths, width)
        bar_width = width - sum(self._widths[name] + 2 for name in names)
        cells: list[Text | Bar] = [Text(parts[name]) for name in names]
        widths = [self._widths[name] for name in names]
        if bar_width >= _MIN_BAR:
            at = 1 if "title" in names else 0
            bar_width = min(bar_width, _MAX_BAR)
            cells.insert(at, Bar(max(progress.target, 1), progress.step, width=bar_width))
            widths.insert(at, bar_width)
        line = Table.grid(padding=(0, 2, 0, 0))
        for cell_width in widths:
            line.add_column(width=cell_width, no_wrap=True, overflow="crop")
        line.add_row(*cells)
        return line


@final
class ProgressText(ProgressDisplay):
    """A line of text for `show`; in a notebook it replaces the previous one."""

    def __init__(
        self,
        show: Callable[[Progress, str], None],
        *,
        title: str,
        target: int,
        clock: Callable[[], float] = time.monotonic,
        refresh: float = _REFRESH,
    ) -> None:
        super().__init__(title=title, target=target, clock=clock, refresh=refresh)
        self._show_text = show

    def open(self, progress: Progress) -> None:
        self.update(progress)

    def update(self, progress: Progress) -> None:
        parts = progress.parts()
        title = parts.pop("title")
        details = [text for name, text in parts.items() if text and name not in ("step", "local")]
        note = local_step_note(progress.step, progress.start)
        step = f"{title}: step {progress.step}/{progress.target}{note}"
        self._show_text(progress, "  ".join([step, *details]))

    def close(self) -> None:
        return  # the last text stays


@final
class OptionalProgress(TimedHook):
    """Forwards the calls to a display while there is one."""

    name = "progress"

    def __init__(self) -> None:
        self._display: ProgressDisplay | None = None
        self._metrics: Metrics | None = None

    def due_time(self) -> float:
        return math.inf if self._display is None else self._display.due_time()

    @contextlib.contextmanager
    def show(self, display: ProgressDisplay, state: TrainState) -> Iterator[None]:
        """Show the steps that are made in the block."""
        self._display = display
        self._metrics = None
        display.start(state)
        try:
            yield
        finally:
            self._display = None
            display.end(state, self._metrics, StopReason("shown", done=False))

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self._display is not None:
            self._metrics = metrics
            self._display.after_step(state, metrics)


def _samples(counters: Counters) -> int:
    return counters.get(SAMPLES_SEEN, 0)


def _clock(seconds: float) -> str:
    """Return a duration as 1:05, 2:01:05 or 3d 2:01:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}:{minute:02}:{second:02}"
    if hours:
        return f"{hour}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"


def _shortened(title: str) -> str:
    if len(title) <= _MAX_TITLE:
        return title
    return f"{title[: _MAX_TITLE - 3]}..."
