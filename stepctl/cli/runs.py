"""`stepctl runs`: the runs of a folder in a table."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from stepctl.cli.options import Place, say
from stepctl.cli.pipes import can_show, echo, is_terminal
from stepctl.errors import Exit, printable

if TYPE_CHECKING:
    from stepctl.runs import Run

_HEADS = ("run", "step", "target", "metric", "last", "best", "state", "age")
_LEFT = ("run", "metric", "state")  # columns of text
_COLORS = {
    "running": "green",
    "finished": "",
    "interrupted": "yellow",
    "damaged": "red",
    "unreadable": "red",
    "held": "yellow",
}


@click.command()
@click.argument("folder", metavar="[DIR]", default="runs", type=Place(folder=True))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def runs(folder: str, as_json: bool) -> None:
    """List the runs in DIR (runs, if not given): step, target, how good, whether running, and since when.

    A state is running, finished (at its target, or stopped for good before), interrupted, damaged, unreadable now
    (stderr says why; exit 1), or held by HOST: running on that machine, or killed there, by the age of its last write.
    The metric is that of evaluate or keep_best in the config, or the loss; of evaluations, if there are some.
    """
    import datetime

    from stepctl.problems import in_one_line
    from stepctl.runs import runs_in
    from stepctl.writers.jsonl import json_value

    found = runs_in(folder, datetime.datetime.now(datetime.UTC))
    for run in found:
        if run.state in ("damaged", "unreadable"):
            say(in_one_line(f"{run.name}: {run.reason}"))
        elif run.state == "held":
            say(in_one_line(f"{run.name}: {_held(run)}"))
    if as_json:
        plain = [{key: json_value(value) for key, value in run._asdict().items()} for run in found]
        echo(json.dumps(plain, indent=2))
    elif not found:
        say(f"{printable(folder)}: no run is there; start one with: stepctl train")
    elif is_terminal(sys.stdout):
        _print_table(found)
    else:
        _print_lines(found)
    if any(run.state == "unreadable" for run in found):
        click.get_current_context().exit(Exit.NEGATIVE)


def _print_table(found: list[Run]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in _HEADS:
        table.add_column(
            head,
            justify="left" if head in _LEFT else "right",
            overflow="ellipsis" if can_show("\u2026") else "crop",
        )
    for run in found:
        table.add_row(*map(Text, _cells(run)), style=_COLORS[run.state])
    Console().print(table)


def _print_lines(found: list[Run]) -> None:
    rows = [_HEADS, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(_HEADS, row, widths, strict=True)
        line = "  ".join(cell.ljust(width) if head in _LEFT else cell.rjust(width) for head, cell, width in cells)
        echo(line.rstrip())


def _cells(run: Run) -> tuple[str, ...]:
    values = ["-" if value is None else f"{value:.4g}" for value in (run.last, run.best)]
    return (*map(_text, (run.name, run.step, run.target, run.metric)), *values, _state(run), _in_words(run.age))


def _state(run: Run) -> str:
    return run.state if run.host is None else f"held by {_text(run.host)}"


def _held(run: Run) -> str:
    written = "" if run.age is None else f" (last write {_in_words(run.age)} ago)"
    return f"held by {run.reason}{written}; if that process was killed, stepctl resume goes on with the run"


def _text(value: object) -> str:
    from stepctl.problems import in_one_line

    return "-" if value is None else in_one_line(str(value), 60)


def _in_words(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
