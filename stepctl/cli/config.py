"""`stepctl config`: check a config, or print the schema of configs."""

import click

from stepctl.cli.options import json_option, set_option
from stepctl.cli.output import echo, echo_json
from stepctl.cli.parameter_types import Place


@click.group()
def config() -> None:
    """Check a config, or print the schema of configs."""


@config.command()
@click.argument("file", type=Place(), metavar="FILE")
@set_option
@json_option("the config")
def check(file: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Check FILE and print it with all defaults; all errors are listed at once."""
    from stepctl.config import yaml
    from stepctl.config.model import parse_config

    document = yaml.load(file)
    document.set_all(assignments)
    parsed = parse_config(document)

    from stepctl.training.resolve import check_without_data

    check_without_data(parsed)
    plain = parsed.plain()
    if as_json:
        echo_json(plain)
    else:
        echo(yaml.dumps(plain).rstrip())


@config.command()
@json_option("the schema")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of configs, which is always JSON."""
    from stepctl.config import json_schema

    echo_json(json_schema.schema())
