"""Curves of a metric over the global step, as an image or as text for a terminal."""

import io
import itertools
import logging
import math
import warnings
from collections.abc import Collection, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from stepctl.errors import ConfigError, printable
from stepctl.reports.run_table import main_metric
from stepctl.rundir.directory import RunDirectory
from stepctl.system.optional import require
from stepctl.system.text import did_you_mean
from stepctl.writers.base import FIRST_KEYS, MetricsRow
from stepctl.writers.jsonl import as_number

FORMATS = ("png", "svg", "pdf")
_MAX_DRAWN = 1e300  # of absolute values: the difference of two must not overflow
_MAX_LISTED = 8  # segment boundaries in a legend
_COLORS = ("blue", "orange", "green", "red", "magenta", "cyan")  # names in plotext
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FRAME = "─│┌┐└┘├┤┬┴┼"
_ASCII_FRAME = str.maketrans(_FRAME, "-|+++++++++")
SYMBOLS = f"{_FRAME}⠤●"  # the characters of `render_text` besides ASCII

# by the field of RunCurves
_STYLES: dict[str, dict[str, Any]] = {
    "training": {"linewidth": 1.2},
    "validation": {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 3.5},
    "boundaries": {"linewidth": 0.7, "linestyle": ":"},
}
_LABELS = {"boundaries": "segment boundary"}  # in a legend, where they differ from the field

Curve = list[tuple[int, float]]  # (global step, value), in ascending order


class RunCurves(NamedTuple):
    """The curves of one run. `boundaries` are the steps at which later segments started."""

    run: str
    training: Curve
    validation: Curve
    boundaries: list[int]


def read_curves(paths: Sequence[str], metric: str) -> list[RunCurves]:
    """Return the curves of each run; ConfigError without a run, or if no run has the metric."""
    directories = [RunDirectory(path) for path in paths]
    boundaries = []
    for directory in directories:
        ledger = directory.read_ledger()
        boundaries.append(sorted({start["step"] for start in ledger.starts[1:]}))
        if not directory.holds_run(ledger):
            raise ConfigError(f"{directory.path}: no run is there; list them with: stepctl runs")
    names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    known = set(FIRST_KEYS)
    found = []
    for name, directory, steps in zip(names, directories, boundaries, strict=True):
        points: dict[object, Curve] = {"train": [], "eval": []}
        for row in directory.read_metrics():
            known |= _new_metrics(row, known)
            value = as_number(row.get(metric))
            kind = row.get("kind")
            if value is not None and kind in points:
                points[kind].append((row["step"], value))
        training = _in_order(points["train"])
        validation = _in_order(points["eval"])
        found.append(RunCurves(name, training, validation, steps))
    known.difference_update(FIRST_KEYS)
    if metric not in known:
        hint = "there are none yet"
        if known:
            hint = f"there are: {', '.join(sorted(known))}"
        guess = did_you_mean(metric, sorted(known))
        raise ConfigError(f"--metric {metric}: no such metric{guess}; {hint}")
    return found


def _new_metrics(row: MetricsRow, known: Collection[str]) -> set[str]:
    """Return the keys of a row that have numbers and are not known yet."""
    return {name for name in row if name not in known and as_number(row[name]) is not None}


def _in_order(points: Curve) -> Curve:
    """Return points in ascending order of their steps; of those with one step, the last."""
    if all(a[0] < b[0] for a, b in itertools.pairwise(points)):
        return points
    return sorted(dict(points).items())


def default_metric(paths: Sequence[str]) -> str:
    """Return the loss if a run has it, else the first main metric of a run."""
    directories = [RunDirectory(path) for path in paths]
    for directory in directories:
        if any("loss" in row for row in directory.read_metrics()):
            return "loss"
    for directory in directories:
        metric = main_metric(directory)
        if metric is not None:
            return metric
    return "loss"


def render_image(found: Sequence[RunCurves], metric: str, kind: str) -> bytes:
    """Return an image file of one of the FORMATS; ConfigError if matplotlib is missing."""
    figures = require("matplotlib.figure", "plot")
    lines = require("matplotlib.lines", "plot")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks
        figure = figures.Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("global step")
        axes.set_ylabel(printable(metric), parse_math=False)
        axes.grid(alpha=0.25)
        keys = []
        names = []
        for number, curves in enumerate(found):
            color = f"C{number % 10}"
            _draw_curves(axes, curves, color)
            keys.append(lines.Line2D([], [], color=color))
            names.append(curves.run)
        for field, style in _STYLES.items():
            if any(getattr(curves, field) for curves in found):
                keys.append(lines.Line2D([], [], color="grey", **style))
                names.append(_LABELS.get(field, field))
        legend = axes.legend(keys, [""] * len(keys))
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.update({"text": printable(name), "parse_math": False})
        image = io.BytesIO()
        figure.savefig(image, format=kind)
    return image.getvalue()


def _draw_curves(axes: Any, curves: RunCurves, color: str) -> None:
    for field in ("training", "validation"):
        curve: Curve = getattr(curves, field)
        steps = [step for step, _ in curve]
        values = [value if math.isfinite(value) else math.nan for _, value in curve]
        axes.plot(steps, values, color=color, **_STYLES[field])
    for step in curves.boundaries:
        axes.axvline(step, color=color, **_STYLES["boundaries"])


def render_text(
    found: Sequence[RunCurves],
    metric: str,
    *,
    width: int,
    height: int,
    color: bool,
    ascii_only: bool = False,
) -> str:
    """Return lines for a terminal, with a legend at the end; ConfigError if plotext is missing.

    `ascii_only`: use none of the SYMBOLS.
    """
    plotext = require("plotext", "plot")
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plot_size(width, height)
    plotext.title(printable(metric))
    plotext.xlabel("global step")
    for set_color in (plotext.canvas_color, plotext.axes_color, plotext.ticks_color):
        set_color("default")
    can_use_braille = not ascii_only and (color or len(found) == 1)
    legend = []
    for curves, letter, line_color in zip(found, cycle(_LETTERS), cycle(_COLORS), strict=False):
        marker = "braille" if can_use_braille else letter
        legend.append(_draw_text(plotext, curves, marker, line_color))
    text = plotext.build().rstrip("\n") + "\n" + "\n".join(legend)
    if ascii_only:
        text = text.translate(_ASCII_FRAME)
    return str(text if color else plotext.uncolorize(text))


def _draw_text(plotext: Any, curves: RunCurves, marker: str, color: str) -> str:
    """Draw the curves of one run, and return its line of the legend."""
    for step in curves.boundaries:
        plotext.vline(step, "gray")
    legend = [printable(curves.run)]
    line_sign = marker
    point_sign = marker.upper()
    if marker == "braille":
        line_sign = "⠤"
        point_sign = "●"
    training = [(step, value) for step, value in curves.training if abs(value) < _MAX_DRAWN]
    if training:
        steps, values = zip(*training, strict=True)
        plotext.plot(steps, values, marker=marker, color=color)
        legend.append(f"{plotext.colorize(line_sign, color)} training")
    validation = [(step, value) for step, value in curves.validation if abs(value) < _MAX_DRAWN]
    if validation:
        steps, values = zip(*validation, strict=True)
        plotext.scatter(steps, values, marker=point_sign, color=color)
        legend.append(f"{plotext.colorize(point_sign, color)} validation")
    if curves.boundaries:
        listed = ", ".join(map(str, curves.boundaries[:_MAX_LISTED]))
        legend.append(f"│ segments from {listed}")
    return "  ".join(legend)
