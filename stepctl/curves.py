"""Curves of a metric on the global step, of one or more runs: as an image, and as text for a terminal."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from stepctl.errors import ConfigError, printable
from stepctl.extras import require
from stepctl.problems import did_you_mean
from stepctl.rundir import RunDirectory
from stepctl.runs import main_metric
from stepctl.writers.base import Row
from stepctl.writers.jsonl import as_number

FORMATS = ("png", "svg", "pdf")
_NO_METRIC = ("step", "kind", "extra")
_LARGEST = 1 << 63  # a step beyond it is nobody's
_COLORS = ("blue", "orange", "green", "red", "magenta", "cyan")  # of plotext
_DRAWN = 1e300  # of what is drawn: the difference of two such must not overflow
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FRAME = "─│┌┐└┘├┤┬┴┼"
_PLAIN = str.maketrans(_FRAME, "-|+++++++++")
SYMBOLS = f"{_FRAME}⠤●"  # what `as_text` draws with, beside letters

Points = list[tuple[int, float]]


class Curves(NamedTuple):
    """A run's points (step, value), rising, and the steps at which a later segment began."""

    run: str
    training: Points
    validation: Points
    boundaries: list[int]


def curves_of(paths: Sequence[str], metric: str) -> list[Curves]:
    """Return the curves of each run. ConfigError where no run is, or if none of them has the metric."""
    directories = [RunDirectory(path) for path in paths]
    for directory in directories:
        if not directory.holds_run():
            raise ConfigError(f"{directory.path}: no run is there; list them with: stepctl runs")
    rows = [directory.read_metrics() for directory in directories]
    known = sorted({name for each in rows for row in each for name in row if as_number(row[name]) is not None})
    known = [name for name in known if name not in _NO_METRIC]
    if metric not in known:
        there = f"there are: {', '.join(known)}" if known else "there are none yet"
        raise ConfigError(f"--metric {metric}: no such metric{did_you_mean(metric, known)}; {there}")
    names = [directory.name for directory in directories]
    names = names if len(set(names)) == len(names) else list(map(str, paths))
    return [
        Curves(name, _points(each, "train", metric), _points(each, "eval", metric), _boundaries(directory))
        for name, each, directory in zip(names, rows, directories, strict=True)
    ]


def metric_of(paths: Sequence[str]) -> str:
    """Return what to draw of runs if nobody says: the loss if one has it, or what the first of them goes by."""
    directories = [RunDirectory(path) for path in paths]
    if any("loss" in row for directory in directories for row in directory.read_metrics()):
        return "loss"
    return next(filter(None, map(main_metric, directories)), "loss")


def _points(rows: list[Row], kind: str, metric: str) -> Points:
    values = {row["step"]: as_number(row.get(metric)) for row in rows if row.get("kind") == kind}
    return sorted((step, value) for step, value in values.items() if value is not None and 0 <= step < _LARGEST)


def _boundaries(directory: RunDirectory) -> list[int]:
    starts = [row["step"] for row in directory.read_ledger() if row["event"] == "start"]
    return sorted({step for step in starts[1:] if 0 <= step < _LARGEST})


def as_image(found: Sequence[Curves], metric: str, kind: str) -> bytes:
    """Return an image file of one of the FORMATS; ConfigError if matplotlib is missing."""
    figures, lines = require("matplotlib.figure", "plot"), require("matplotlib.lines", "plot")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # a letter that the font lacks
        figure = figures.Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("global step")
        axes.set_ylabel(printable(metric), parse_math=False)
        axes.grid(alpha=0.25)
        for number, each in enumerate(found):
            _draw(axes, each, f"C{number % 10}")
        keys = [lines.Line2D([], [], color=f"C{number % 10}") for number in range(len(found))]
        names = [each.run for each in found]
        for name, style in _styles(found).items():
            keys.append(lines.Line2D([], [], color="grey", **style))
            names.append(name)
        legend = axes.legend(keys, [""] * len(keys))
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.update({"text": printable(name), "parse_math": False})
        image = io.BytesIO()
        figure.savefig(image, format=kind)
    return image.getvalue()


_TRAINING: dict[str, Any] = {"linewidth": 1.2}
_VALIDATION: dict[str, Any] = {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 3.5}
_BOUNDARY: dict[str, Any] = {"linewidth": 0.7, "linestyle": ":"}


def _styles(found: Sequence[Curves]) -> dict[str, dict[str, Any]]:
    used = {"training": (_TRAINING, any(each.training for each in found))}
    used["validation"] = (_VALIDATION, any(each.validation for each in found))
    used["segment boundary"] = (_BOUNDARY, any(each.boundaries for each in found))
    return {name: style for name, (style, is_used) in used.items() if is_used}


def _draw(axes: Any, curves: Curves, color: str) -> None:
    for points, style in ((curves.training, _TRAINING), (curves.validation, _VALIDATION)):
        values = [value if math.isfinite(value) else math.nan for _, value in points]
        axes.plot([step for step, _ in points], values, color=color, **style)
    for step in curves.boundaries:
        axes.axvline(step, color=color, **_BOUNDARY)


def as_text(
    found: Sequence[Curves], metric: str, *, width: int, height: int, color: bool, ascii_only: bool = False
) -> str:
    """Return lines for a terminal, the last ones a legend; ConfigError if plotext is missing.

    `ascii_only`: draw without any of the SYMBOLS.
    """
    plotext = require("plotext", "plot")
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plot_size(width, height)
    plotext.title(printable(metric))
    plotext.xlabel("global step")
    for paint in (plotext.canvas_color, plotext.axes_color, plotext.ticks_color):
        paint("default")
    legend = []
    for number, each in enumerate(found):
        shade = _COLORS[number % len(_COLORS)]
        line = _LETTERS[number % len(_LETTERS)]
        if not ascii_only and (color or len(found) == 1):
            line = "braille"
        legend.append(_draw_text(plotext, each, line, shade))
    text = plotext.build().rstrip("\n") + "\n" + "\n".join(legend)
    if ascii_only:
        text = text.translate(_PLAIN)
    return str(text if color else plotext.uncolorize(text))


def _draw_text(plotext: Any, curves: Curves, line: str, color: str) -> str:
    for step in curves.boundaries:
        plotext.vline(step, "gray")
    parts = []
    for name, points, marker, sign in (
        ("training", curves.training, line, "⠤" if line == "braille" else line),
        ("validation", curves.validation, "●" if line == "braille" else line.upper(), None),
    ):
        finite = [(step, value) for step, value in points if abs(value) < _DRAWN]
        if not finite:
            continue
        steps, values = zip(*finite, strict=True)
        draw = plotext.plot if name == "training" else plotext.scatter
        draw(steps, values, marker=marker, color=color)
        parts.append(f"{plotext.colorize(sign or marker, color)} {name}")
    if curves.boundaries:
        parts.append(f"│ segments from {', '.join(map(str, curves.boundaries[:8]))}")
    return "  ".join([printable(curves.run), *parts])
