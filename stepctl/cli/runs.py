"""`stepctl runs`: list the runs in a folder."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from stepctl.cli.options import json_option
from stepctl.cli.output import can_show, echo, echo_json
from stepctl.cli.parameter_types import Place
from stepctl.errors import Exit, printable
from stepctl.system.terminal import is_terminal, say
from stepctl.system.text import align_columns, in_one_line

if TYPE_CHECKING:
    from stepctl.reports.run_table import RunSummary

_HEADS = ("run", "step", "target", "metric", "last", "best", "state", "age")
_LEFT = (0, 3, 6)  # columns of text: run, metric, state
_COLORS = {
    "running": "green",
    "finished": "",
    "interrupted": "yellow",
    "damaged": "red",
    "unreadable": "red",
    "held": "yellow",
}
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
_MAX_CELL = 60  # characters


@click.command()
@click.argument("folder", metavar="[DIR]", default="runs", type=Place(folder=True))
@json_option("the runs")
def runs(folder: str, as_json: bool) -> None:
    """List the runs in a folder.

    For each run in DIR (default: runs): step, target, metric, state, and age of the last event. The
    state is running, finished (at its target, or ended by a stop rule), interrupted, damaged,
    unreadable (stderr has the reason; exit 1), or held by HOST: running on that machine, or killed
    there; the age is then of its last write. The metric is the one of evaluate or keep_best in the
    config, or the loss; of evaluations if there are any.
    """
    import datetime

    from stepctl.reports.run_table import list_runs
    from stepctl.writers.jsonl import json_value

    found = list_runs(folder, datetime.datetime.now(datetime.UTC))
    for run in found:
        if run.state in ("damaged", "unreadable"):
            say(in_one_line(f"{run.name}: {run.reason}"))
        elif run.state == "held":
            say(in_one_line(f"{run.name}: {_describe_holder(run)}"))
    if as_json:
        echo_json([{key: json_value(value) for key, value in vars(run).items()} for run in found])
    elif not found:
        say(f"{printable(folder)}: no runs; start one with: stepctl train")
    elif is_terminal(sys.stdout):
        _print_table(found)
    else:
        for line in align_columns([_HEADS, *map(_cells, found)], left=_LEFT):
            echo(line)
    if any(run.state == "unreadable" for run in found):
        click.get_current_context().exit(Exit.NEGATIVE)


def _print_table(found: list[RunSummary]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(_HEADS):
        table.add_column(
            head,
            justify="left" if number in _LEFT else "right",
            overflow="ellipsis" if can_show("\u2026") else "crop",
        )
    for run in found:
        table.add_row(*map(Text, _cells(run)), style=_COLORS[run.state])
    Console().print(table)


def _cells(run: RunSummary) -> list[str]:
    state: str = run.state
    if run.host is not None:
        state = f"held by {_text(run.host)}"
    return [
        _text(run.name),
        _text(run.step),
        _text(run.target),
        _text(run.metric),
        _number(run.last),
        _number(run.best),
        state,
        _duration(run.age),
    ]


def _describe_holder(run: RunSummary) -> str:
    holder = f"held by {run.reason}"
    if run.age is not None:
        holder += f" (last write {_duration(run.age)} ago)"
    return f"{holder}; if that process was killed, continue with stepctl resume"


def _text(value: object) -> str:
    if value is None:
        return "-"
    return in_one_line(str(value), _MAX_CELL)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in _UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
