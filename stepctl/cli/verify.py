"""`stepctl verify`: prove that a checkpoint, or a run, is what it should be."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from stepctl import shell
from stepctl.cli.options import Place, say
from stepctl.cli.pipes import echo
from stepctl.errors import ConfigError, Exit, printable


@click.command()
@click.argument("path", metavar="PATH", type=Place())
@click.option("--replay", "steps", metavar="A:B", help="Train again from checkpoint A to B, in memory, and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def verify(path: str, steps: str | None, as_json: bool) -> None:
    """Check a checkpoint, or every file of a run and its records; exit 1 if anything is wrong."""
    if steps is not None:
        _replay(path, steps, as_json)
        return
    from stepctl.problems import counted
    from stepctl.rundir import refuse_nowhere
    from stepctl.verify import verify as verify_path

    refuse_nowhere(path)
    found, problems = verify_path(path)
    if as_json:
        files = [{"step": good.step, "sha256": good.sha256, "file": good.file} for good in found]
        answer = {"ok": not problems, "files": files, "problems": [problem._asdict() for problem in problems]}
        echo(json.dumps(answer, indent=2))
    else:
        for good in found:
            echo(f"{good.file}  global step {good.step}  good")
        for problem in problems:
            echo(f"{printable(problem.message)}  [{problem.code}]")
        echo(f"{path}: {counted(len(problems), 'problem')}" if problems else f"{path}: good")
        if any(problem.code == "lost" for problem in problems):
            say(f"if the missing files were removed on purpose: {shell.command('prune', path, '--forget-missing')}")
    click.get_current_context().exit(Exit.NEGATIVE if problems else Exit.DONE)


def _replay(path: str, steps: str, as_json: bool) -> None:
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", steps)
    if match is None:
        raise ConfigError(f"--replay {steps}: give two steps that have a checkpoint, such as 100:200")
    from stepctl import numerics
    from stepctl.rundir import RunDirectory

    directory = RunDirectory(path)
    numerics.pin(*numerics.asked_for(directory.newest_config().value))

    from stepctl.replay import replay

    legs: list[dict[str, Any]] = []
    for step, differences in replay(directory, int(match[1]), int(match[2]), say):
        legs.append({"step": step, "equal": not differences, "differences": differences})
        if not as_json:
            echo(f"step {step}: the same, to the bit" if not differences else f"step {step}: differs")
            for item in differences:
                echo(f"  /{describe(item)}")
        if differences:
            break
    equal = all(leg["equal"] for leg in legs)
    if as_json:
        echo(json.dumps({"equal": equal, "steps": legs}, indent=2))
    click.get_current_context().exit(Exit.DONE if equal else Exit.NEGATIVE)


def describe(item: dict[str, Any]) -> str:
    """Return in words where two arrays, or two counters, differ."""
    if "a" in item:
        return f"{item['path']}: {item['a']} and {item['b']}"
    differ = "element differs, at" if item["n_different"] == 1 else "elements differ, the first at"
    ulp = "" if item["max_ulp"] is None else f", {item['max_ulp']:,} ULP"
    return f"{item['path']}: {item['n_different']:,} {differ} {item['first']}; at most by {item['max_abs']:.3g}{ulp}"
