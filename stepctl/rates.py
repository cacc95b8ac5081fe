"""Learning rates ahead of training: at the steps of interest, and as a picture."""

from __future__ import annotations

import bisect
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepctl import config as configs
from stepctl import extras, registry
from stepctl.assembly import Assembly
from stepctl.errors import ConfigError
from stepctl.folder import publish
from stepctl.problems import in_one_line, reason
from stepctl.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BETWEEN = 5  # steps between the first and the last whose rate is shown
_POINTS = 2000  # of a picture
_MARKED = 20  # landmarks that get a line of their own there


class Rate:
    """One learning rate on the global step, from where an assembly's state stands on, if nothing disturbs the run."""

    def __init__(self, key: str, schedule: Schedule, count: Callable[[int], int]) -> None:
        """`count` tells what the schedule's counter stands at at a global step."""
        self.key, self.schedule, self._count = key, schedule, count

    def at(self, step: int) -> float:
        """Return the rate of the first update after `step`; ConfigError if a schedule of one's own fails there."""
        try:
            return float(self.schedule(self._count(step)))
        except registry.FOREIGN as error:
            raise ConfigError(in_one_line(f"{self.key}: fails at step {step}: {reason(error)}")) from error

    def turns(self, start: int, last: int) -> list[int]:
        """Return the global steps at which the counter comes to a landmark, from `start` to `last` - 1."""
        steps, first = range(start, last), self._count(start)
        found = (
            bisect.bisect_left(steps, mark, key=self._count) for mark in self.schedule.landmarks() if mark >= first
        )
        return [steps[index] for index in found if index < len(steps)]


def rates_of(assembly: Assembly) -> list[Rate]:
    """Return the learning rate of each of the task's optimizers."""
    found = []
    for name, learner in assembly.task.learners.items():
        schedule = learner.optimizer.learning_rate
        key = "optimizer.learning_rate" if name == configs.MODEL else f"optimizer.{name}.learning_rate"
        found.append(Rate(key, schedule, counting(assembly, schedule.counter)))
    return found


def counting(assembly: Assembly, counter: str) -> Callable[[int], int]:
    """Return the function global step -> what a counter stands at there, counted on from where the state stands."""
    counters = assembly.state.counters
    ahead = counters[counter] - assembly.count_at(counter, counters.global_step)
    return lambda step: ahead + assembly.count_at(counter, step)


def table(assembly: Assembly, start: int, last: int) -> dict[str, dict[str, Any]]:
    """Return for each learning rate its "counter", "landmarks" (values of it) and "rates" at some global steps.

    The "value" at a step is that of the update to the step after it, so the last one is at last - 1; it "turns" where
    the counter comes to a landmark.
    """
    return {
        rate.key: {
            "counter": rate.schedule.counter,
            "landmarks": rate.schedule.landmarks(),
            "rates": _rows(rate, start, last),
        }
        for rate in rates_of(assembly)
    }


def _rows(rate: Rate, start: int, last: int) -> list[dict[str, Any]]:
    turns = set(rate.turns(start, last))
    steps = sorted({*spread(start, last, _BETWEEN + 2), *turns})
    return [{"step": step, "value": rate.at(step), "turns": step in turns} for step in steps]


def spread(start: int, last: int, n: int) -> list[int]:
    """Return up to n evenly spaced steps from `start` to last - 1; none if no update lies between."""
    width = last - 1 - start
    return sorted({start + width * i // (n - 1) for i in range(n)}) if width >= 0 else []


# --- the picture


def draw(path: str, title: str, assembly: Assembly, start: int, last: int) -> None:
    """Write a PNG of the learning rates over the global steps from `start` to `last` - 1.

    ConfigError without matplotlib, or if there is no step to draw; StepctlError if the file cannot be written.
    """
    figure_class = extras.require("matplotlib.figure", "plot").Figure
    if start >= last:
        raise ConfigError("--png: there is no learning rate to draw; give a --last-step past the start, or no --png")
    figure = figure_class(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for rate in rates_of(assembly):
        turns = rate.turns(start, last)
        steps = points(start, last, turns)
        (line,) = axes.plot(steps, [rate.at(step) for step in steps], label=rate.key)
        for step in turns if len(turns) <= _MARKED else []:
            axes.axvline(step, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="global step", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    _write(path, figure)


def points(start: int, last: int, turns: Iterable[int]) -> list[int]:
    """Return at most about 2000 steps to draw: evenly spaced ones, and on both sides of as many turns as fit."""
    near = [step for turn in list(turns)[: _POINTS // 4] for step in (turn - 1, turn) if step >= start]
    return sorted({*near, *spread(start, last, _POINTS - len(near))})


def _write(path: str, figure: Figure) -> None:
    content = io.BytesIO()  # first, so that a drawing that fails leaves no half a file
    figure.savefig(content, format="png", dpi=100)
    publish(Path(path), [content.getvalue()])
