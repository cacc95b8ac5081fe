"""`stepctl init`: write a first config."""

from __future__ import annotations

import click

from stepctl.cli.options import json_option
from stepctl.cli.output import echo_json
from stepctl.cli.parameter_types import Place
from stepctl.errors import printable
from stepctl.system import shell
from stepctl.system.terminal import say


@click.command()
@click.argument("folder", metavar="[DIR]", default=".", type=Place(folder=True))
@click.option(
    "--from",
    "table",
    type=Place(),
    metavar="FILE",
    help="A CSV file to learn from: target, task and preprocessing are proposed.",
)
@click.option(
    "--example",
    metavar="NAME",
    help="An example: quickstart, digits, regression, wgan-digits, wgan-gp-digits or ising.",
)
@json_option("the files that were written")
def init(folder: str, table: str | None, example: str | None, as_json: bool) -> None:
    """Write a first config.

    The config in DIR (default: the current folder) has comments, and trains as it is: by default on
    the digits of the package. No file is overwritten.
    """
    if table is not None and example is not None:
        raise click.UsageError("--from and --example: give one")
    from pathlib import Path

    from stepctl.runs import starter

    place = Path(folder)
    if table is not None:
        found = starter.for_table(place, table)
    elif example is not None:
        found = starter.example(place, example)
    else:
        found = starter.for_digits(place)
    starter.write_starter(found)
    if as_json:
        echo_json({"config": str(found.config), "files": [str(path) for path in found.files]})
        return
    for message in found.messages:
        say(printable(message))
    command = shell.command("train", found.config.relative_to(place))
    if place != Path():
        command = f"cd {shell.options(str(place))} && {command}"
    say(f"{found.config}: written; train it with: {command}")
