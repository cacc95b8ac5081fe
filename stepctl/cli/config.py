"""`stepctl config`: check a config, or print what one may hold."""

from __future__ import annotations

import json

import click

from stepctl.cli.options import set_option


@click.group()
def config() -> None:
    """Check a config, or print the schema of one."""


@config.command()
@click.argument("file", metavar="FILE")
@set_option
def check(file: str, assignments: tuple[str, ...]) -> None:
    """Check FILE and print it with every default written out; all errors are listed at once."""
    from stepctl import config as configs
    from stepctl import yamlio

    document = yamlio.load(file)
    for assignment in assignments:
        document.set(assignment)
    click.echo(yamlio.dumps(configs.parse(document).plain()), nl=False)


@config.command()
def schema() -> None:
    """Print the JSON Schema of a config."""
    from stepctl import config as configs

    click.echo(json.dumps(configs.schema(), indent=2))
