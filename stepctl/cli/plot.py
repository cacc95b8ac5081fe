"""`stepctl plot`: draw the metrics of runs, in the terminal or to a file."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from stepctl.cli.options import json_option
from stepctl.cli.output import can_show, echo
from stepctl.cli.parameter_types import Place
from stepctl.errors import ConfigError, printable
from stepctl.system.terminal import is_terminal, say

if TYPE_CHECKING:
    from stepctl.reports.curves import RunCurves

_MAX_HEIGHT = 30  # lines


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=Place(folder=True))
@click.option(
    "--metric", metavar="NAME", help="The metric (default: the loss, or the runs' main metric)."
)
@click.option(
    "-o", "--output", type=Place(), metavar="FILE", help="Write a .png, .svg or .pdf instead."
)
@json_option("the points")
def plot(paths: tuple[str, ...], metric: str | None, output: str | None, as_json: bool) -> None:
    """Draw a metric of one or more runs.

    The training and evaluation rows are drawn over the global step, with the starts of segments.
    """
    import json
    from pathlib import Path

    from stepctl.reports import curves
    from stepctl.system.folder import publish

    kind = Path(output or "").suffix.removeprefix(".").lower()
    if output is not None and kind not in curves.FORMATS:
        raise ConfigError(f"-o {output}: the name must end in one of .{', .'.join(curves.FORMATS)}")
    if metric is None:
        metric = curves.default_metric(paths)
    found = curves.read_curves(paths, metric)
    for run in found:
        if not run.training and not run.validation:
            say(printable(f"{run.run}: no row has {metric}, so nothing is drawn"))
    if output is not None:
        publish(Path(output), [curves.render_image(found, metric, kind)])
        names = ", ".join(printable(run.run) for run in found)
        say(f"{printable(output)}: {printable(metric)} of {names}")
    if as_json:
        echo(json.dumps([_plain(run) for run in found]))
    elif output is None:
        _print_text(found, metric)


def _print_text(found: list[RunCurves], metric: str) -> None:
    import shutil

    from stepctl.reports import curves

    size = shutil.get_terminal_size()
    color = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    text = curves.render_text(
        found,
        metric,
        width=size.columns,
        height=min(size.lines - len(found) - 1, _MAX_HEIGHT),
        color=color,
        ascii_only=not can_show(curves.SYMBOLS),
    )
    echo(text, color=color)


def _plain(run: RunCurves) -> dict[str, Any]:
    from stepctl.writers.jsonl import json_value

    fields = run._asdict()
    for name in ("training", "validation"):
        fields[name] = [[step, json_value(value)] for step, value in fields[name]]
    return fields
