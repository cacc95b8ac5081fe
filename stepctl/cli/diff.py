"""`stepctl diff`: compare two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stepctl.cli.options import json_option, refuse_missing
from stepctl.cli.output import echo, echo_json
from stepctl.cli.parameter_types import Place
from stepctl.errors import Exit, printable
from stepctl.system.text import in_one_line

if TYPE_CHECKING:
    from stepctl.reports.diff import ArrayDifference
    from stepctl.state.value_text import ValueDifference

_MAX_VALUES = 50  # differences that are printed
_MAX_TEXT = 60  # characters of a value


@click.command()
@click.argument("a", metavar="A", type=Place(run=True))
@click.argument("b", metavar="B", type=Place(run=True))
@json_option("the comparison")
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare two checkpoints to the bit.

    A and B are checkpoints or runs, of which the newest good checkpoint is compared. Exit 0 if
    counters, arrays and values are equal. Config keys that differ are shown and do not count.
    """
    from stepctl.reports.sandboxed import compare_paths
    from stepctl.system.sandbox import Sandbox

    for path in (a, b):
        refuse_missing(path)
    with Sandbox() as sandbox:
        found = sandbox.call(compare_paths, a, b)
    if as_json:
        echo_json(found)
    else:
        for item in found["counters"]:
            echo(printable(f"counters {item['key']}: {item['a']} and {item['b']}"))
        for item in found["config"]:
            echo(printable(f"config {item['key']}: {item['a']} and {item['b']}"))
        for array in found["arrays"]:
            echo(describe_difference(array))
        for value in found["values"][:_MAX_VALUES]:
            echo(describe_difference(value))
        n_more = len(found["values"]) - _MAX_VALUES
        if n_more > 0:
            echo(f"... and {n_more:,} more values differ")
        echo("identical" if found["equal"] else "different")
    if not found["equal"]:
        raise click.exceptions.Exit(Exit.NEGATIVE)


def describe_difference(array: ArrayDifference | ValueDifference) -> str:
    """Return a line on the differences between two arrays, counters or values."""
    path = printable(array["path"])
    if "a" in array:
        return f"{path}: {_shown(array['a'])} and {_shown(array['b'])}"
    if array["equal"]:
        return f"{path}: equal"
    elements = f"{array['n_different']:,} elements differ"
    if array["n_different"] == 1:
        elements = "1 element differs"
    difference = f"max abs difference {array['max_abs']:.3g}"
    if array["max_ulp"] is not None:
        difference += f" ({array['max_ulp']:,} ULP)"
    return f"{path}: {elements}, first at {array['first']}; {difference}"


def _shown(value: object) -> str:
    return "nothing" if value is None else in_one_line(str(value), _MAX_TEXT)
