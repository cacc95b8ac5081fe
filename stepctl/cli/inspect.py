"""`stepctl inspect`: look into a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import click

from stepctl.cli.options import Place, say
from stepctl.cli.pipes import echo
from stepctl.errors import printable

_NONE = "-"  # a pattern that no path matches


@click.command()
@click.argument("path", metavar="PATH", type=Place())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--path", "pattern", default="*", metavar="PATTERN", help="Only arrays such as 'params/*'.")
@click.option("--step", "step_only", is_flag=True, help="Print the global step alone.")
def inspect(path: str, as_json: bool, pattern: str, step_only: bool) -> None:
    """Show what a checkpoint holds.

    Of a run: its newest good checkpoint, its newest segment (one train or resume: from which global step to which,
    and why it ended), and the run and step that it was forked from.
    """
    from stepctl.rundir import refuse_nowhere
    from stepctl.sandbox import Sandbox

    refuse_nowhere(path)
    with Sandbox() as sandbox:
        answer = sandbox.call("stepctl.report:inspect_path", path, _NONE if step_only else pattern)
    facts = answer["facts"]
    for line in answer["said"]:
        say(line)
    if step_only:
        echo(facts["global_step"])
        return
    if not facts["arrays"]:
        say(f"no array's path matches {pattern!r}; a pattern is such as 'params/*'")
    if as_json:
        echo(json.dumps(facts, indent=2))
    else:
        print_facts(facts)


def print_facts(facts: dict[str, Any]) -> None:
    """Print the facts about a checkpoint for people."""
    from stepctl import yamlio

    run, maker = printable(facts["run"]), printable(facts["created_by"])
    echo(f"{facts['file']}  global step {facts['global_step']}  run {run}  by {maker}")
    echo(f"sha256      {facts['sha256']}")
    echo(f"counters    {'  '.join(f'{name} {value}' for name, value in facts['counters'].items())}")
    if facts["relations"] is not None:
        echo(f"relations   {_relations(facts)}")
    echo(f"numerics    {printable('  '.join(f'{name} {value}' for name, value in facts['numerics'].items()))}")
    echo(f"parameters  {facts['parameters']:,}")
    _print_run(facts)
    echo()
    heads = ("path", "shape", "dtype", "count", "min", "max", "mean", "std", "non_finite")
    rows = [heads, *([_cell(array[head]) for head in heads] for array in facts["arrays"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        echo("  ".join(cells))
    echo("\nconfig")
    echo("".join(f"  {printable(line)}\n" for line in yamlio.dumps(facts["config"]).splitlines()), nl=False)


def _print_run(facts: dict[str, Any]) -> None:
    if (segment := facts.get("segment")) is not None:
        steps = f"from step {segment['from']} to {segment['to']}, target {segment['target']}"
        how = "running or killed" if segment["reason"] is None else f"ended {segment['ended']}: {segment['reason']}"
        echo(printable(f"segment     {segment['number']}  {steps}  {how}"))
    if (parent := facts.get("parent")) is not None:
        echo(printable(f"forked from {parent['run']}  at step {parent['step']}  sha256 {parent['sha256']}"))
        for change in parent["changes"]:
            echo(printable(f"            {change.get('key')}: {change.get('old')} -> {change.get('new')}"))


def _relations(facts: dict[str, Any]) -> str:
    wrong = [name for name, holds in facts["relations"].items() if not holds]
    told = ", ".join(facts["relations"])
    return (
        f"{', '.join(wrong)}: not as its task counts" if wrong else f"{told}: as many as these steps of its task make"
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return str(tuple(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
