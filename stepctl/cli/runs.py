"""`stepctl runs`: list the runs in a folder."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from stepctl.cli.options import json_option
from stepctl.cli.output import can_show, echo, echo_json
from stepctl.cli.parameter_types import Place
from stepctl.errors import Exit, printable
from stepctl.system.terminal import is_terminal, say
from stepctl.system.text import align_columns, config_text, in_one_line

if TYPE_CHECKING:
    from stepctl.reports.run_table import RunSummary

# columns in the order in which they are left out on a terminal that is too narrow: these before and
# after the config keys but the first, and then it
_DROPPED_FIRST = ("age", "target")
_DROPPED_NEXT = ("last",)
_DROPPED_LAST = ("best", "metric", "step")  # a value is shown with the name of its metric only
_MAX_DIFFERING = 8  # columns of config keys
_COLORS = {
    "running": "green",
    "finished": "",
    "interrupted": "yellow",
    "failed": "red",
    "damaged": "red",
    "unreadable": "red",
    "held": "yellow",
}
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
_MAX_CELL = 60  # characters


class _Column(NamedTuple):
    head: str
    cells: list[str]
    is_text: bool = False  # aligned to the left


@click.command()
@click.argument("folder", metavar="[DIR]", default="runs", type=Place(folder=True))
@click.option(
    "--sort", metavar="METRIC", help="Show this metric, and the runs in the order of its best."
)
@json_option("the runs")
def runs(folder: str, sort: str | None, as_json: bool) -> None:
    """List the runs in a folder.

    For each run in DIR (default: runs): step, target, the config keys that differ between the runs,
    metric, state, and age of the last event. The state is running, finished (at its target, or
    ended by a stop rule), interrupted, failed (ended by an error, such as a loss that is not finite),
    damaged, unreadable (stderr has the reason; exit 1), or held by HOST: running on that machine,
    or killed there; the age is then of its last write. The metric is the one of --sort, of evaluate
    or keep_best in the config, or the loss; of evaluations if there are any. On a terminal that is
    too narrow, columns are left out.
    """
    import datetime

    from stepctl.reports.run_table import list_runs

    found = list_runs(folder, datetime.datetime.now(datetime.UTC), sort=sort)
    for run in found:
        if run.state in ("damaged", "unreadable", "failed"):
            say(in_one_line(f"{run.name}: {run.reason}"))
        elif run.state == "held":
            say(in_one_line(f"{run.name}: {_describe_holder(run)}"))
    if as_json:
        echo_json([_plain(run) for run in found])
    elif not found:
        say(f"{printable(folder)}: no runs; start one with: stepctl train")
    elif is_terminal(sys.stdout):
        print_table(found)
    else:
        columns = _columns(found)
        left = [number for number, column in enumerate(columns) if column.is_text]
        heads = [column.head for column in columns]
        rows = zip(*(column.cells for column in columns), strict=True)
        for line in align_columns([heads, *rows], left=left):
            echo(line)
    if any(run.state == "unreadable" for run in found):
        click.get_current_context().exit(Exit.NEGATIVE)


def _plain(run: RunSummary) -> dict[str, Any]:
    from stepctl.writers.jsonl import json_value

    hidden = ("config", "lower_is_better")
    return {key: json_value(value) for key, value in vars(run).items() if key not in hidden}


def print_table(found: list[RunSummary]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    columns, dropped = _fitting(_columns(found), console.width)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column.head,
            justify="left" if column.is_text else "right",
            no_wrap=True,
            overflow="ellipsis" if can_show("\u2026") else "crop",
        )
    for number, run in enumerate(found):
        cells = [Text(column.cells[number]) for column in columns]
        table.add_row(*cells, style=_COLORS[run.state])
    console.print(table)
    if dropped:
        say(f"left out in {console.width} columns: {', '.join(dropped)}")


def _columns(found: list[RunSummary]) -> list[_Column]:
    from stepctl.reports.config_columns import short_names

    fixed_heads = ("run", "step", "target", "metric", "last", "best", "state", "age")
    keys = [*dict.fromkeys(key for run in found for key in run.differing)][:_MAX_DIFFERING]
    heads = short_names(keys, fixed_heads)
    differing = [
        _Column(printable(head), [_setting(run.differing.get(key)) for run in found])
        for head, key in zip(heads, keys, strict=True)
    ]
    return [
        _Column("run", [_text(run.name) for run in found], is_text=True),
        _Column("step", [_text(run.step) for run in found]),
        _Column("target", [_text(run.target) for run in found]),
        *differing,
        _Column("metric", [_text(run.metric) for run in found], is_text=True),
        _Column("last", [_number(run.last) for run in found]),
        _Column("best", [_number(run.best) for run in found]),
        _Column("state", [_state(run) for run in found], is_text=True),
        _Column("age", [_duration(run.age) for run in found]),
    ]


def _fitting(columns: list[_Column], width: int) -> tuple[list[_Column], list[str]]:
    """Return the columns that fit into a width, and the heads of those that are left out.

    The first ones to go are age and target, then the config keys from the last to the second.
    """
    from rich.cells import cell_len

    widths = {
        column.head: max(map(cell_len, (column.head, *column.cells))) + 2 for column in columns
    }
    heads = list(widths)
    differing = heads[heads.index("target") + 1 : heads.index("metric")]
    order = [*_DROPPED_FIRST, *reversed(differing[1:]), *_DROPPED_NEXT]
    order += [*differing[:1], *_DROPPED_LAST]
    dropped = []
    for head in order:
        if sum(widths.values()) - 2 <= width:
            break
        del widths[head]
        dropped.append(head)
    return [column for column in columns if column.head in widths], dropped


def _state(run: RunSummary) -> str:
    if run.host is not None:
        return f"held by {_text(run.host)}"
    return run.state


def _setting(value: object) -> str:
    if value is None or isinstance(value, str):
        return _text(value)
    return in_one_line(config_text(value), _MAX_CELL)


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
