"""`stepctl prune`: remove checkpoints that need not be kept."""

import re
from typing import Any

import click

from stepctl.cli.options import json_option
from stepctl.cli.output import echo, echo_json
from stepctl.cli.parameter_types import Place, WholeNumber
from stepctl.errors import ConfigError
from stepctl.system.terminal import say


@click.command()
@click.argument("run_dir", metavar="RUN", type=Place(folder=True, run=True))
@click.option("--keep-last", type=WholeNumber(min=1), metavar="N", help="Keep the N newest.")
@click.option("--keep-every", type=WholeNumber(min=1), metavar="N", help="Keep the multiples of N.")
@click.option(
    "--keep-best",
    metavar="METRIC:MODE:N",
    help="Keep the N best evaluations, such as accuracy:max:2.",
)
@click.option(
    "--forget-missing",
    is_flag=True,
    help="Remove nothing; record that missing checkpoints are gone.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; print what would be removed.")
@json_option("the steps")
def prune(
    run_dir: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: str | None,
    forget_missing: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove checkpoints that need not be kept.

    The newest good one of RUN always stays. The rules are those of the config
    (checkpoint.keep_last, keep_every, keep_best); an option overrides its key. With
    --forget-missing, checkpoints that were deleted by hand are no longer expected, so that verify
    and runs report the run as good again.
    """
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs import prune as pruning

    directory = RunDirectory(run_dir)
    options = {
        "keep_last": keep_last,
        "keep_every": keep_every,
        "keep_best": _parse_keep_best(keep_best),
    }
    given = {key: value for key, value in options.items() if value is not None}
    if forget_missing:
        if given:
            raise click.UsageError(
                "--forget-missing removes nothing; give the --keep options in a second command"
            )
        steps = pruning.forget_missing(directory, say, dry_run=dry_run)
    else:
        steps = pruning.prune(directory, given, say, dry_run=dry_run)
    if as_json:
        key = "forgotten" if forget_missing else "pruned"
        echo_json({key: steps, "dry_run": dry_run})
    elif forget_missing:
        _print_steps(run_dir, steps, "would forget" if dry_run else "forgot", "nothing is missing")
    else:
        _print_steps(run_dir, steps, "would remove" if dry_run else "removed", "nothing to remove")


def _print_steps(run_dir: str, steps: list[int], verb: str, nothing: str) -> None:
    from stepctl.checkpoint import names

    for step in steps:
        echo(f"{verb} {names.file_name(step)}")
    if not steps:
        echo(f"{run_dir}: {nothing}")


def _parse_keep_best(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([^:]+):(min|max)(?::([1-9][0-9]{0,8}))?", text)
    if match is None:
        raise ConfigError(
            f"--keep-best {text}: give a metric, min or max, and a number, such as accuracy:max:2"
        )
    return {"metric": match[1], "mode": match[2], "n": int(match[3] or 1)}
