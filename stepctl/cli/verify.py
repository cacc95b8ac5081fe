"""`stepctl verify`: check a checkpoint or a run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from stepctl.cli.diff import describe_difference
from stepctl.cli.options import json_option, refuse_missing
from stepctl.cli.output import echo, echo_json
from stepctl.cli.parameter_types import Place
from stepctl.cli.progress import progress_bar
from stepctl.errors import ConfigError, Exit, printable
from stepctl.system import shell, store_url
from stepctl.system.terminal import say
from stepctl.system.text import counted

if TYPE_CHECKING:
    from stepctl.reports.diff import Replayed
    from stepctl.runs.records import RunRecords


@click.command()
@click.argument("path", metavar="PATH", type=Place(run=True))
@click.option(
    "--replay",
    "steps",
    metavar="A:B",
    help="Repeat the training from checkpoint A to B, and compare.",
)
@json_option("the result")
@click.argument("command", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
def verify(path: str, steps: str | None, as_json: bool, command: tuple[str, ...]) -> None:
    """Check a checkpoint or a run.

    Of a run, all files and records are checked. Exit 1 if there is a problem. PATH may be the URL of
    a mirror: all of its objects are downloaded and checked. COMMAND is for --replay of a script's
    run: it starts the script, whose steps go to a copy.
    """
    if store_url.is_url(path):
        if steps is not None or command:
            raise click.UsageError(f"--replay needs the run here: {shell.command('pull', path)}")
        is_good = _check_mirror(path, as_json)
    elif steps is None:
        if command:
            raise click.UsageError("a command is for --replay A:B: give both")
        is_good = _check_files(path, as_json)
    else:
        is_good = _replay(path, steps, command, as_json)
    if not is_good:
        raise click.exceptions.Exit(Exit.NEGATIVE)


def _check_files(path: str, as_json: bool) -> bool:
    from stepctl.reports.verify import verify as verify_path

    refuse_missing(path)
    with progress_bar("verify") as report:
        good, problems = verify_path(path, report)
    if as_json:
        checked = [
            {"step": file["step"], "sha256": file["sha256"], "file": file["name"]} for file in good
        ]
        found = [problem._asdict() for problem in problems]
        echo_json({"ok": not problems, "files": checked, "problems": found})
        return not problems
    for file in good:
        echo(f"{file['name']}  global step {file['step']}  good")
    for problem in problems:
        echo(f"{printable(problem.message)}  [{problem.code}]")
    echo(f"{path}: {counted(len(problems), 'problem') if problems else 'good'}")
    if any(problem.code == "lost" for problem in problems):
        remedy = shell.command("prune", path, "--forget-missing")
        say(f"if the missing files were removed on purpose: {remedy}")
    return not problems


def _check_mirror(url: str, as_json: bool) -> bool:
    from stepctl.mirror.store import open_store
    from stepctl.reports.mirror import verify_mirror

    with progress_bar("verify") as report:
        good, problems = verify_mirror(open_store(url), report)
    if as_json:
        found = [problem._asdict() for problem in problems]
        echo_json({"ok": not problems, "commits": good, "problems": found})
        return not problems
    for commit in good:
        objects = counted(commit["objects"], "object")
        echo(f"{commit['epoch']}-{commit['seq']}  global step {commit['step']}  {objects}  good")
    for problem in problems:
        echo(f"{printable(problem.message)}  [{problem.code}]")
    echo(f"{url}: {counted(len(problems), 'problem') if problems else 'good'}")
    if problems:
        say(f"to repair it from the run: {shell.command('push', 'RUN', url, '--all')}")
    return not problems


def _replay(path: str, steps: str, command: tuple[str, ...], as_json: bool) -> bool:
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", steps)
    if match is None:
        raise ConfigError(f"--replay {steps}: give the steps of two checkpoints, such as 100:200")
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.records import read_records
    from stepctl.system import blas

    records = read_records(RunDirectory(path))
    blas.set_environment(*blas.requested_numerics(records.document.value))

    first = int(match[1])
    last = int(match[2])
    if first >= last:
        raise ConfigError(f"--replay {first}:{last}: the second step must be later")
    legs = []
    for step, differences in _replayed(records, first, last, command):
        legs.append({"step": step, "equal": not differences, "differences": differences})
        if not as_json:
            echo(f"step {step}: {'differs' if differences else 'bit-identical'}")
            for item in differences:
                echo(f"  /{describe_difference(item)}")
        if differences:
            break
    equal = all(leg["equal"] for leg in legs)
    if as_json:
        echo_json({"equal": equal, "steps": legs})
    return equal


def _replayed(records: RunRecords, first: int, last: int, command: tuple[str, ...]) -> Replayed:
    """Repeat the steps in this process or, those of a script, by the command that starts it."""
    from stepctl.runs.records import is_script, script_command

    if command:
        from stepctl.reports.replay_script import replay_script

        return replay_script(records, first, last, command, say)
    if is_script(records):
        started = script_command(records) or "python SCRIPT"
        replay = shell.command("verify", records.directory.path, "--replay", f"{first}:{last}")
        raise ConfigError(
            f"{records.directory.path}: its steps are made by a script; replay it with: {replay} -- "
            f"{started}"
        )
    from stepctl.reports.replay import replay as replay_config

    return replay_config(records, first, last, say)
