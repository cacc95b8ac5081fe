"""`stepctl config`: check a config, or print what one may hold."""

from __future__ import annotations

import json

import click

from stepctl.cli.options import Place, set_option
from stepctl.cli.pipes import echo


@click.group()
def config() -> None:
    """Check a config, or print the schema of one."""


@config.command()
@click.argument("file", type=Place(), metavar="FILE")
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def check(file: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Check FILE and print it with every default written out; all errors are listed at once."""
    from stepctl import config as configs
    from stepctl import yamlio

    document = yamlio.load(file)
    document.set_all(assignments)
    parsed = configs.parse(document)

    from stepctl.assembly import check_without_data

    check_without_data(parsed)
    plain = parsed.plain()
    echo(json.dumps(plain, indent=2) if as_json else yamlio.dumps(plain).rstrip())


@config.command()
def schema() -> None:
    """Print the JSON Schema of a config."""
    from stepctl.schema import schema as of_a_config

    echo(json.dumps(of_a_config(), indent=2))
