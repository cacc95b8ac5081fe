"""Curves of a metric over the global step, as an image or as text for a terminal."""

import contextlib
import io
import itertools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from stepctl.errors import ConfigError, StepctlError, printable
from stepctl.reports.run_table import main_metric, new_metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.system.optional import require
from stepctl.system.shell import command
from stepctl.system.text import did_you_mean
from stepctl.writers.base import FIRST_KEYS
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
_FAINT = {"linewidth": 0.8, "alpha": 0.3}  # of the values that are smoothed
_MAX_NAMED = 4  # runs in a default title
_MAX_TICKS = 6  # on the axis of steps
_LABELS = {"boundaries": "segment boundary"}  # in a legend, where they differ from the field

Curve = list[tuple[int, float]]  # (global step, value), in ascending order


class Style(NamedTuple):
    """How curves are drawn.

    `smooth` is the weight of the past in a moving average of the training curves, from 0 (none) to
    below 1; `log_y` draws the values above 0 on a logarithmic axis. Without a title, an image has
    the names of its runs.
    """

    title: str = ""
    log_y: bool = False
    smooth: float = 0.0


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
            raise ConfigError(f"{directory.path}: no run is there; {_remedy(directory.path)}")
    names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    known = set(FIRST_KEYS)
    found = []
    for name, directory, steps in zip(names, directories, boundaries, strict=True):
        points: dict[object, Curve] = {"train": [], "eval": []}
        for row in directory.read_metrics():
            known |= new_metrics(row, known)
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


def _remedy(path: Path) -> str:
    """Return the command that draws the runs in a folder, or lists all runs if it has none."""
    with contextlib.suppress(OSError, StepctlError):
        visible = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        are_runs = [entry.is_dir() and RunDirectory(entry).holds_run() for entry in visible]
        if any(are_runs):
            # the shell must expand the star, so it is not quoted
            way = f"{command('plot', path)}/*" if all(are_runs) else command("runs", path)
            return f"for the runs in it: {way}"
    return "list them with: stepctl runs"


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


def smoothed(curve: Curve, weight: float) -> Curve:
    """Return an exponential moving average of the finite values, corrected for its start.

    The average of n values has the weights weight^(n - i), divided by their sum.
    """
    average = 0.0
    norm = 0.0
    found = []
    for step, value in curve:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            norm = weight * norm + (1 - weight)
            found.append((step, average / norm))
    return found


def whole_ticks(first: int, last: int) -> list[int]:
    """Return at most 6 round numbers from `first` to `last`: multiples of 1, 2 or 5 times 10^n."""
    unit = 1
    while True:
        for multiple in (unit, 2 * unit, 5 * unit):
            ticks = range(-(-first // multiple) * multiple, last + 1, multiple)
            if len(ticks) <= _MAX_TICKS:
                return [*ticks]
        unit *= 10


def drawable(curve: Curve, style: Style) -> Curve:
    """Return the points that can be drawn: finite, and on a logarithmic axis above 0."""
    return [
        (step, value)
        for step, value in curve
        if abs(value) < _MAX_DRAWN and (value > 0 or not style.log_y)
    ]


def default_title(names: Sequence[str]) -> str:
    """Return the names of the runs, or their number if there are many."""
    if len(names) <= _MAX_NAMED:
        return ", ".join(names)
    return f"{len(names)} runs"


def render_image(
    figures: Mapping[str, Sequence[RunCurves]], kind: str, style: Style | None = None
) -> bytes:
    """Return an image file of one of the FORMATS, with a panel for each metric.

    ConfigError if matplotlib is missing.
    """
    matplotlib_figure = require("matplotlib.figure", "plot")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    style = style or Style()
    with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks
        height = 4.5 if len(figures) == 1 else 3.2 * len(figures)
        figure = matplotlib_figure.Figure(figsize=(8, height), dpi=150, layout="constrained")
        panels = figure.subplots(len(figures), sharex=True, squeeze=False)[:, 0]
        for axes, (metric, found) in zip(panels, figures.items(), strict=True):
            _draw_panel(axes, metric, found, style)
        panels[-1].set_xlabel("global step")
        names = [curves.run for curves in next(iter(figures.values()))]
        title = printable(style.title or default_title(names))
        figure.suptitle(title, fontsize="medium", parse_math=False)
        image = io.BytesIO()
        figure.savefig(image, format=kind)
    return image.getvalue()


def _draw_panel(axes: Any, metric: str, found: Sequence[RunCurves], style: Style) -> None:
    lines = require("matplotlib.lines", "plot")
    ticker = require("matplotlib.ticker", "plot")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if style.log_y:
        axes.set_yscale("log")
    axes.set_ylabel(printable(metric), parse_math=False)
    axes.grid(alpha=0.25)
    keys = []
    names = []
    for number, curves in enumerate(found):
        color = f"C{number % 10}"
        _draw_curves(axes, curves, color, style)
        keys.append(lines.Line2D([], [], color=color))
        names.append(curves.run)
    for field, look in _STYLES.items():
        if any(getattr(curves, field) for curves in found):
            keys.append(lines.Line2D([], [], color="grey", **look))
            names.append(_LABELS.get(field, field))
    legend = axes.legend(keys, [""] * len(keys))
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.update({"text": printable(name), "parse_math": False})


def _draw_curves(axes: Any, curves: RunCurves, color: str, style: Style) -> None:
    training = curves.training
    if style.smooth:
        _draw_line(axes, training, style, color=color, **_FAINT)
        training = smoothed(training, style.smooth)
    _draw_line(axes, training, style, color=color, **_STYLES["training"])
    _draw_line(axes, curves.validation, style, color=color, **_STYLES["validation"])
    for step in curves.boundaries:
        axes.axvline(step, color=color, **_STYLES["boundaries"])


def _draw_line(axes: Any, curve: Curve, style: Style, **look: Any) -> None:
    """Draw a curve, with a gap at values that cannot be drawn."""
    steps = [step for step, _ in curve]
    values = [
        value if math.isfinite(value) and (value > 0 or not style.log_y) else math.nan
        for _, value in curve
    ]
    axes.plot(steps, values, **look)


def render_text(
    found: Sequence[RunCurves],
    metric: str,
    *,
    width: int,
    height: int,
    color: bool,
    ascii_only: bool = False,
    style: Style | None = None,
) -> str:
    """Return lines for a terminal, with a legend at the end; ConfigError if plotext is missing.

    `ascii_only`: use none of the SYMBOLS.
    """
    plotext = require("plotext", "plot")
    style = style or Style()
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plot_size(width, height)
    title = printable(metric)
    if style.title:
        title = f"{printable(style.title)}: {title}"
    plotext.title(title)
    plotext.xlabel("global step")
    for set_color in (plotext.canvas_color, plotext.axes_color, plotext.ticks_color):
        set_color("default")
    can_use_braille = not ascii_only and (color or len(found) == 1)
    legend = []
    for curves, letter, line_color in zip(found, cycle(_LETTERS), cycle(_COLORS), strict=False):
        marker = "braille" if can_use_braille else letter
        legend.append(_draw_text(plotext, curves, marker, line_color, style))
    shown = [
        (step, value)
        for curves in found
        for curve in (curves.training, curves.validation)
        for step, value in drawable(curve, style)
    ]
    if shown:
        steps = [step for step, _ in shown]
        for curves in found:
            steps += curves.boundaries
        ticks = whole_ticks(min(steps), max(steps))
        plotext.xticks(ticks, [str(tick) for tick in ticks])
        if style.log_y:
            plotext.yscale("log")
    text = plotext.build().rstrip("\n") + "\n" + "\n".join(legend)
    if ascii_only:
        text = text.translate(_ASCII_FRAME)
    return str(text if color else plotext.uncolorize(text))


def _draw_text(plotext: Any, curves: RunCurves, marker: str, color: str, style: Style) -> str:
    """Draw the curves of one run, and return its line of the legend."""
    for step in curves.boundaries:
        plotext.vline(step, "gray")
    legend = [printable(curves.run)]
    line_sign = marker
    point_sign = marker.upper()
    if marker == "braille":
        line_sign = "⠤"
        point_sign = "●"
    training = drawable(curves.training, style)
    if style.smooth:
        training = smoothed(training, style.smooth)
    if training:
        steps, values = zip(*training, strict=True)
        plotext.plot(steps, values, marker=marker, color=color)
        legend.append(f"{plotext.colorize(line_sign, color)} training")
    validation = drawable(curves.validation, style)
    if validation:
        steps, values = zip(*validation, strict=True)
        plotext.scatter(steps, values, marker=point_sign, color=color)
        legend.append(f"{plotext.colorize(point_sign, color)} validation")
    if curves.boundaries:
        listed = ", ".join(map(str, curves.boundaries[:_MAX_LISTED]))
        legend.append(f"│ segments from {listed}")
    return "  ".join(legend)
