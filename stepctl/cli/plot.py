"""`stepctl plot`: draw the metrics of runs, in the terminal or to a file."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from stepctl.cli.options import json_option
from stepctl.cli.output import can_show, echo
from stepctl.cli.parameter_types import Place, Weight
from stepctl.errors import ConfigError, printable
from stepctl.system.terminal import is_terminal, say

if TYPE_CHECKING:
    from stepctl.reports.curves import RunCurves, Style

_MAX_HEIGHT = 30  # lines
_MIN_HEIGHT = 10


@click.command()
@click.argument(
    "paths", metavar="RUN...", nargs=-1, required=True, type=Place(folder=True, run=True)
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="The metric (default: the loss, or the runs' main metric); repeat it for several.",
)
@click.option(
    "-o", "--output", type=Place(), metavar="FILE", help="Write a .png, .svg or .pdf instead."
)
@click.option("--log-y", is_flag=True, help="Draw the values on a logarithmic axis.")
@click.option(
    "--smooth",
    type=Weight(),
    default=0.0,
    metavar="W",
    help="Draw a moving average of the training rows; W, from 0 to below 1, is the weight of the past.",
)
@click.option("--title", default="", metavar="TEXT", help="The title (default: the runs).")
@json_option("the points")
def plot(
    paths: tuple[str, ...],
    metrics: tuple[str, ...],
    output: str | None,
    log_y: bool,
    smooth: float,
    title: str,
    as_json: bool,
) -> None:
    """Draw metrics of one or more runs.

    The training and evaluation rows are drawn over the global step, with the starts of segments.
    """
    import json
    from pathlib import Path

    from stepctl.reports import curves
    from stepctl.system.folder import publish

    kind = Path(output or "").suffix.removeprefix(".").lower()
    if output is not None and kind not in curves.FORMATS:
        raise ConfigError(f"-o {output}: the name must end in one of .{', .'.join(curves.FORMATS)}")
    style = curves.Style(title, log_y, smooth)
    figures = {
        metric: curves.read_curves(paths, metric)
        for metric in metrics or (curves.default_metric(paths),)
    }
    for metric, found in figures.items():
        for run in found:
            _report_missing(run, metric, style)
    if output is not None:
        publish(Path(output), [curves.render_image(figures, kind, style)])
        names = ", ".join(printable(run.run) for run in found)
        say(f"{printable(output)}: {printable(', '.join(figures))} of {names}")
    if as_json:
        echo(json.dumps([_plain(run, metric) for metric in figures for run in figures[metric]]))
    elif output is None:
        for metric, found in figures.items():
            _print_text(found, metric, style, len(figures))


def _report_missing(run: RunCurves, metric: str, style: Style) -> None:
    from stepctl.reports.curves import drawable

    points = run.training + run.validation
    if not points:
        say(printable(f"{run.run}: no row has {metric}, so nothing is drawn"))
    elif not drawable(points, style):
        kind = "value above 0" if style.log_y else "finite value"
        say(printable(f"{run.run}: {metric} has no {kind}, so nothing is drawn"))


def _print_text(found: list[RunCurves], metric: str, style: Style, n_figures: int) -> None:
    import shutil

    from stepctl.reports import curves

    size = shutil.get_terminal_size()
    color = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    text = curves.render_text(
        found,
        metric,
        width=size.columns,
        height=max(min(size.lines // n_figures - len(found) - 1, _MAX_HEIGHT), _MIN_HEIGHT),
        color=color,
        ascii_only=not can_show(curves.SYMBOLS),
        style=style,
    )
    echo(text, color=color)


def _plain(run: RunCurves, metric: str) -> dict[str, Any]:
    from stepctl.writers.jsonl import json_value

    fields = {"metric": metric, **run._asdict()}
    for name in ("training", "validation"):
        fields[name] = [[step, json_value(value)] for step, value in fields[name]]
    return fields
