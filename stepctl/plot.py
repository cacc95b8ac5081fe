"""Pictures, with matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from stepctl.config import Config
from stepctl.errors import ConfigError
from stepctl.plan import inside, rate_at, schedules, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 2000
_MARKED = 20  # landmarks that get a line of their own


def learning_rate_png(path: str, title: str, config: Config, start: int, last: int) -> None:
    """Write a picture of the learning rate over the global steps from `start` to `last` - 1.

    ConfigError without matplotlib, if there is nothing to draw, or if the file cannot be written.
    """
    figure_class = _figure_class()
    if start >= last or not schedules(config):
        raise ConfigError(
            "--png: there is no learning rate to draw; give a --last-step past the start, or leave it out"
        )
    figure = figure_class(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, schedule in schedules(config).items():
        landmarks = inside(schedule.landmarks(), start, last)
        steps = points(start, last, landmarks)
        (line,) = axes.plot(steps, [rate_at(key, schedule, step) for step in steps], label=key)
        for step in landmarks if len(landmarks) <= _MARKED else []:
            axes.axvline(step, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="global step", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    _write(path, figure)


def points(start: int, last: int, landmarks: list[int]) -> list[int]:
    """Return at most about 2000 steps to draw: evenly spaced ones, and on both sides of as many landmarks as fit."""
    near = [step for landmark in landmarks[: _POINTS // 4] for step in (landmark - 1, landmark) if step >= start]
    return sorted({*near, *spread(start, last, _POINTS - len(near))})


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png: matplotlib is missing; install it with: pip install 'stepctl[plot]'") from error
    return Figure


def _write(path: str, figure: Figure) -> None:
    content = io.BytesIO()  # first, so that a drawing that fails leaves no half a file
    figure.savefig(content, format="png", dpi=100)
    try:
        with open(path, "wb") as file:
            file.write(content.getvalue())
    except OSError as error:
        raise ConfigError(f"--png: {path}: cannot be written: {error.strerror}; give another path") from error
