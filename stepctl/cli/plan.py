"""`stepctl plan`: what a run would do, without doing it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stepctl import files
from stepctl.cli.options import Place, say, set_option, stop_assignments, stop_section, target_options
from stepctl.cli.pipes import echo
from stepctl.errors import ConfigError, printable

if TYPE_CHECKING:
    from stepctl.assembly import Assembly


@click.command()
@click.argument("path", metavar="CONFIG|RUN", type=Place())
@set_option
@target_options
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option("--png", type=Place(), metavar="FILE", help="Draw the learning rate over the global steps, too.")
def plan(
    path: str,
    assignments: tuple[str, ...],
    num_steps: int | None,
    last_step: int | None,
    as_json: bool,
    png: str | None,
) -> None:
    """Print what a run would do, without training: of a config a fresh run, of a RUN its resume.

    Shapes, sizes in bytes, the global steps at which it logs, saves and evaluates, how many checkpoints are kept
    and the disk that they take, and the learning rate (per update) along the way.
    """
    if png is not None and not png.lower().endswith(".png"):
        raise ConfigError(f"--png {png}: the name must end in .png")
    if files.is_directory(path):
        found, assembly = _of_run(path, stop_section(num_steps, last_step), assignments)
    else:
        found, assembly = _of_config(path, (*stop_assignments(num_steps, last_step), *assignments))
    if png is not None:
        from stepctl.rates import draw

        draw(png, printable(path), assembly, *found["steps"])
    print_plan(found, as_json)


def _of_config(path: str, assignments: tuple[str, ...]) -> tuple[dict[str, Any], Assembly]:
    from stepctl import numerics, yamlio
    from stepctl.rundir import RunDirectory

    document = yamlio.load(path)
    document.set_all(assignments)
    numerics.pin(*numerics.asked_for(document.value))

    from stepctl import config as configs
    from stepctl.assembly import prepare
    from stepctl.plan import plan as plan_fresh

    assembly = prepare(configs.parse(document), say=say)
    return plan_fresh(assembly, RunDirectory(Path("runs") / Path(path).stem)), assembly


def _of_run(path: str, stop: dict[str, int] | None, assignments: tuple[str, ...]) -> tuple[dict[str, Any], Assembly]:
    from stepctl import numerics
    from stepctl.rundir import RunDirectory

    directory = RunDirectory(path)
    document = directory.newest_config()
    document.set_all(assignments)
    numerics.pin(*numerics.asked_for(document.value))

    from stepctl.config import Stop
    from stepctl.plan import plan_resume
    from stepctl.run import ResumeOptions

    options = ResumeOptions(assignments=assignments, stop=Stop.model_validate(stop) if stop else None)
    return plan_resume(directory, options, say)


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print a plan to stdout."""
    if as_json:
        echo(json.dumps(plan, indent=2))
        return
    for line in (*_sizes(plan), *_steps(plan), *_checkpoints(plan["checkpoints"]), *_rates(plan["learning_rate"])):
        echo(printable(line))
    for note in plan["notes"]:
        echo(printable(f"note: {note}"))


def _sizes(plan: dict[str, Any]) -> Iterator[str]:
    samples, sizes = plan["samples"], plan["bytes"]
    yield f"run directory  {plan['run_dir']}"
    shape = tuple(samples["shape"])
    yield f"samples        {samples['training']} training, {samples['validation']} validation, of shape {shape}"
    for name, shape in plan["parameters"].items():
        yield f"  {name:<24} {tuple(shape)}"
    for name, shape in plan["buffers"].items():
        yield f"  {name:<24} {tuple(shape)}  buffer"
    yield f"parameters     {plan['n_parameters']:,}"
    yield f"memory         {sizes['state']:,} bytes of state, {sizes['gradients']:,} of gradients"
    yield f"checkpoint     {sizes['checkpoint']:,} bytes"


def _steps(plan: dict[str, Any]) -> Iterator[str]:
    start, last = plan["steps"]
    nothing = ": nothing to do (more: --num-steps N)" if "from" in plan and start >= last else ""
    yield f"steps          {start} to {last}{nothing}"
    if "from" in plan:
        yield f"from           {plan['from']}; a plain resume goes on to step {plan['plain_target']}"
    for name, event in plan["events"].items():
        yield f"{name:<15}{event['words']}"


def _checkpoints(kept: dict[str, Any]) -> Iterator[str]:
    best = kept["keep_best"]
    rules = {key: kept[key] for key in ("keep_last", "keep_every") if kept[key] is not None}
    if best is not None:
        rules["keep_best"] = f"{best['metric']}:{best['mode']}:{best['n']}"
    why = ", ".join(f"{key} {value}" for key, value in rules.items()) or "all"
    up_to = "up to " if best is not None else ""
    yield f"kept           {up_to}{kept['at_end']:,} at the end: {kept['bytes_at_end']:,} bytes ({why})"
    yield f"               at most {kept['at_most']:,} at a time: {kept['bytes_at_most']:,} bytes"


def _rates(rates: dict[str, dict[str, Any]]) -> Iterator[str]:
    for key, rate in rates.items() if any(rate["rates"] for rate in rates.values()) else ():
        turns = " (*: it turns there)" if any(point["turns"] for point in rate["rates"]) else ""
        yield f"{key}, of the update from a global step to the next{turns}"
        for point in rate["rates"]:
            yield f"  {point['step']:<12} {point['value']:.6g}{'  *' if point['turns'] else ''}"
