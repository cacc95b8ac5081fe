"""`stepctl prune`: remove checkpoints that need not be kept."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import click

from stepctl.cli.options import Place, say
from stepctl.cli.pipes import echo
from stepctl.errors import ConfigError

if TYPE_CHECKING:
    from stepctl.rundir import RunDirectory


@click.command()
@click.argument("run_dir", metavar="RUN", type=Place(folder=True))
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the N newest.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="Keep the steps that N divides.")
@click.option("--keep-best", metavar="METRIC:MODE:N", help="Keep the N best evaluations, such as accuracy:max:2.")
@click.option("--forget-missing", is_flag=True, help="Remove nothing; acknowledge that missing files are gone.")
@click.option("--dry-run", is_flag=True, help="Remove nothing, and print what would be.")
@click.option("--json", "as_json", is_flag=True, help="Print the steps as JSON.")
def prune(
    run_dir: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: str | None,
    forget_missing: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove checkpoints of RUN that need not be kept; the newest good one always stays.

    What its config keeps (checkpoint.keep_last, keep_every, keep_best) is kept; an option stands in place of the
    config's key of that name. With --forget-missing, checkpoints that somebody removed (a purge of the disk) are no
    longer expected: verify and runs call the run good again.
    """
    from stepctl import config as configs
    from stepctl.checkpoint import names
    from stepctl.prune import prune as prune_run
    from stepctl.rundir import RunDirectory

    directory = RunDirectory(run_dir)
    if forget_missing:
        if (keep_last, keep_every, keep_best) != (None, None, None):
            raise click.UsageError("--forget-missing removes nothing; give the --keep options in a second command")
        _forget_missing(directory, dry_run, as_json)
        return
    # the one section: what else the config names is not needed here
    said = directory.newest_config().value.get("checkpoint")
    asked: dict[str, Any] = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": _best(keep_best)}
    merged = (said if isinstance(said, dict) else {}) | {
        key: value for key, value in asked.items() if value is not None
    }
    try:
        keep = configs.Checkpoint(**merged)
    except ValueError as error:
        raise ConfigError(f"{directory.shown(directory.config)}: checkpoint: {' '.join(str(error).split())}") from error
    pruned = prune_run(directory, keep, say, dry_run=dry_run)
    if as_json:
        echo(json.dumps({"pruned": pruned, "dry_run": dry_run}, indent=2))
        return
    for step in pruned:
        echo(f"{'would remove' if dry_run else 'removed'} {names.file_name(step)}")
    if not pruned:
        echo(f"{run_dir}: nothing to remove")


def _forget_missing(directory: RunDirectory, dry_run: bool, as_json: bool) -> None:
    from stepctl.checkpoint import names
    from stepctl.prune import forget_missing

    directory.newest_config()  # raises ConfigError where no run is
    missing = forget_missing(directory, say, dry_run=dry_run)
    if as_json:
        echo(json.dumps({"forgotten": missing, "dry_run": dry_run}, indent=2))
        return
    for step in missing:
        echo(f"{'would forget' if dry_run else 'forgot'} {names.file_name(step)}")
    if not missing:
        echo(f"{directory.path}: nothing is missing")


def _best(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([^:]+):(min|max)(?::([1-9][0-9]{0,8}))?", text)
    if match is None:
        raise ConfigError(f"--keep-best {text}: give a metric, min or max, and a number, such as accuracy:max:2")
    return {"metric": match[1], "mode": match[2], "n": int(match[3] or 1)}
