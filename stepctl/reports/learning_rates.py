"""The learning rates of a run ahead of training: as a table at selected steps, and as a picture."""

import bisect
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from stepctl.config import registry
from stepctl.errors import ConfigError
from stepctl.optimizers.schedules import Schedule
from stepctl.system import optional
from stepctl.system.folder import publish
from stepctl.system.text import in_one_line
from stepctl.system.user_code import describe_error
from stepctl.training.assembly import Assembly, TaskAssembly

_TABLE_STEPS = 7  # evenly spaced, besides the landmarks
_DRAWN_STEPS = 2000
_MAX_DRAWN_LANDMARKS = 20


class RatePoint(TypedDict):
    """The rate of the update after a global step; `turns` at a landmark of the schedule."""

    step: int
    value: float
    turns: bool


class RateTable(TypedDict):
    """One learning rate."""

    counter: str
    landmarks: list[int]  # values of the counter
    rates: list[RatePoint]


class PlannedRate:
    """One learning rate as a function of the global step, if the run is not disturbed."""

    def __init__(self, key: str, schedule: Schedule, count: Callable[[int], int]) -> None:
        """`count` returns the value of the schedule's counter at a global step."""
        self.key = key
        self.schedule = schedule
        self._count = count

    def at(self, step: int) -> float:
        """Return the rate of the update after `step`; ConfigError if a user's schedule raises."""
        try:
            return float(self.schedule(self._count(step)))
        except registry.USER_CODE_ERRORS as error:
            message = f"{self.key}: fails at step {step}: {describe_error(error)}"
            raise ConfigError(in_one_line(message)) from error

    def landmark_steps(self, start: int, last: int) -> list[int]:
        """Return the steps from `start` to `last` - 1 at which the counter reaches a landmark."""
        steps = range(start, last)
        found = []
        for landmark in self.schedule.landmarks():
            if landmark < self._count(start):
                continue
            index = bisect.bisect_left(steps, landmark, key=self._count)
            if index < len(steps):
                found.append(steps[index])
        return found


def planned_rates(assembly: Assembly) -> list[PlannedRate]:
    """Return the learning rate of each optimizer."""
    if not isinstance(assembly, TaskAssembly):
        return []
    rates = []
    for name, learner in assembly.task.learners.items():
        schedule = learner.optimizer.learning_rate
        key = assembly.config.learning_rate_key(name)
        rates.append(PlannedRate(key, schedule, count_function(assembly, schedule.counter)))
    return rates


def count_function(assembly: Assembly, counter: str) -> Callable[[int], int]:
    """Return the function from a global step to a counter, which continues the current state."""
    counters = assembly.state.counters
    ahead = counters[counter] - assembly.count_at(counter, counters.global_step)
    return lambda step: ahead + assembly.count_at(counter, step)


def rate_tables(assembly: Assembly, start: int, last: int) -> dict[str, RateTable]:
    """Return a table for each learning rate, by its key, for training from `start` to `last`."""
    tables: dict[str, RateTable] = {}
    for rate in planned_rates(assembly):
        landmarks = set(rate.landmark_steps(start, last))
        points: list[RatePoint] = []
        for step in sorted({*evenly_spaced_steps(start, last, _TABLE_STEPS), *landmarks}):
            points.append({"step": step, "value": rate.at(step), "turns": step in landmarks})
        tables[rate.key] = {
            "counter": rate.schedule.counter,
            "landmarks": rate.schedule.landmarks(),
            "rates": points,
        }
    return tables


def evenly_spaced_steps(start: int, last: int, n: int) -> list[int]:
    """Return up to n steps from `start` to `last` - 1; none if there is no update."""
    width = last - 1 - start
    if width < 0:
        return []
    return sorted({start + width * i // (n - 1) for i in range(n)})


# --- the picture


def draw_rates(path: str, title: str, assembly: Assembly, start: int, last: int) -> None:
    """Write a PNG of the learning rates over the global steps from `start` to `last` - 1.

    ConfigError without matplotlib, or if there is no step to draw; StepctlError if the file cannot
    be written.
    """
    figure_class = optional.require("matplotlib.figure", "plot").Figure
    if start >= last:
        raise ConfigError(
            "--png: no step to draw; give a --last-step after the start, or omit --png"
        )
    rates = planned_rates(assembly)
    if not rates:
        raise ConfigError("--png: a program has no learning rate to draw; omit --png")
    figure = figure_class(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for rate in rates:
        landmarks = rate.landmark_steps(start, last)
        steps = drawn_steps(start, last, landmarks)
        (line,) = axes.plot(steps, [rate.at(step) for step in steps], label=rate.key)
        if len(landmarks) <= _MAX_DRAWN_LANDMARKS:
            for step in landmarks:
                axes.axvline(step, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="global step", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    publish(Path(path), [content.getvalue()])


def drawn_steps(start: int, last: int, landmarks: Sequence[int]) -> list[int]:
    """Return up to about 2000 steps: evenly spaced ones, and both sides of the first landmarks."""
    near = []
    for landmark in landmarks[: _DRAWN_STEPS // 4]:
        near += [step for step in (landmark - 1, landmark) if step >= start]
    return sorted({*near, *evenly_spaced_steps(start, last, _DRAWN_STEPS - len(near))})
