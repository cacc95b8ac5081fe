"""`stepctl plot`: curves of runs, in the terminal or in a file."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stepctl.cli.options import Place, say
from stepctl.cli.pipes import can_show, echo, is_terminal
from stepctl.errors import ConfigError, printable

if TYPE_CHECKING:
    from stepctl.curves import Curves

_MOST_LINES = 30


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=Place(folder=True))
@click.option("--metric", metavar="NAME", help="What to draw; the loss, or what the runs go by, if not given.")
@click.option("-o", "--output", type=Place(), metavar="FILE", help="Write a .png, .svg or .pdf instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the points as JSON.")
def plot(paths: tuple[str, ...], metric: str | None, output: str | None, as_json: bool) -> None:
    """Draw training and evaluation rows of one or more runs on the global step, and where segments began."""
    from stepctl import curves
    from stepctl.folder import publish

    kind = Path(output or "").suffix.removeprefix(".").lower()
    if output is not None and kind not in curves.FORMATS:
        raise ConfigError(f"-o {output}: the name must end in one of .{', .'.join(curves.FORMATS)}")
    metric = curves.metric_of(paths) if metric is None else metric
    found = curves.curves_of(paths, metric)
    for each in found:
        if not each.training and not each.validation:
            say(printable(f"{each.run}: has no row of {metric}; nothing is drawn of it"))
    if output is not None:
        publish(Path(output), [curves.as_image(found, metric, kind)])
        say(f"{printable(output)}: {printable(metric)} of {', '.join(printable(each.run) for each in found)}")
    if as_json:
        echo(json.dumps([_plain(each) for each in found]))
    elif output is None:
        size = shutil.get_terminal_size()
        color = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
        height = min(size.lines - len(found) - 1, _MOST_LINES)
        text = curves.as_text(
            found, metric, width=size.columns, height=height, color=color, ascii_only=not can_show(curves.SYMBOLS)
        )
        echo(text, color=color)


def _plain(curves: Curves) -> dict[str, Any]:
    from stepctl.writers.jsonl import json_value

    points = {"training": curves.training, "validation": curves.validation}
    return curves._asdict() | {name: [[step, json_value(y)] for step, y in each] for name, each in points.items()}
