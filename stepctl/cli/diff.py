"""`stepctl diff`: where two checkpoints differ."""

from __future__ import annotations

import json

import click

from stepctl.cli.options import Place
from stepctl.cli.pipes import echo
from stepctl.cli.verify import describe
from stepctl.errors import Exit, printable


@click.command()
@click.argument("a", metavar="A", type=Place())
@click.argument("b", metavar="B", type=Place())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare two checkpoints, or the newest of two runs: counters, config, and every array to the bit.

    Exit 0 if counters and arrays are the same; keys of the config that differ are shown, and do not count.
    """
    from stepctl.rundir import refuse_nowhere
    from stepctl.sandbox import Sandbox

    for path in (a, b):
        refuse_nowhere(path)
    with Sandbox() as sandbox:
        found = sandbox.call("stepctl.compare:paths", a, b)
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        for section in ("counters", "config"):
            for item in found[section]:
                echo(printable(f"{section} {item['key']}: {item['a']} and {item['b']}"))
        for array in found["arrays"]:
            echo(printable(f"{array['path']}: equal" if array["equal"] else describe(array)))
        echo("the same" if found["equal"] else "they differ")
    click.get_current_context().exit(Exit.DONE if found["equal"] else Exit.NEGATIVE)
