"""`stepctl plan`: show the plan of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from stepctl.cli.options import (
    json_option,
    set_option,
    set_target,
    stop_config,
    stop_section,
    target_options,
)
from stepctl.cli.output import echo, echo_json
from stepctl.cli.parameter_types import Place
from stepctl.errors import ConfigError, printable
from stepctl.system import files
from stepctl.system.terminal import say

if TYPE_CHECKING:
    from stepctl.reports.learning_rates import RateTable
    from stepctl.reports.plan import GroupSettings, KeptCheckpoints, Plan
    from stepctl.training.assembly import Assembly


@click.command()
@click.argument("path", metavar="CONFIG|RUN", type=Place(run=True))
@set_option
@target_options
@json_option("the plan")
@click.option(
    "--png", type=Place(), metavar="FILE", help="Also draw the learning rate over the global steps."
)
def plan(
    path: str,
    assignments: tuple[str, ...],
    num_steps: int | None,
    last_step: int | None,
    as_json: bool,
    png: str | None,
) -> None:
    """Show the plan of a run, without training.

    For a new run from CONFIG, or a resume of RUN: shapes, sizes in bytes, the global steps at which
    it logs, saves and evaluates, the number and size of the checkpoints that are kept, and the
    learning rate (per update).
    """
    if png is not None and not png.lower().endswith(".png"):
        raise ConfigError(f"--png {png}: the name must end in .png")
    stop = stop_section(num_steps, last_step)
    plan_of = _plan_resume if files.is_directory(path) else _plan_new_run
    found, assembly = plan_of(path, stop, assignments)
    with contextlib.closing(assembly):
        if png is not None:
            from stepctl.reports.learning_rates import draw_rates

            draw_rates(png, printable(path), assembly, *found["steps"])
        print_plan(found, as_json)


def _plan_new_run(
    path: str, stop: dict[str, int], assignments: tuple[str, ...]
) -> tuple[Plan, Assembly]:
    from pathlib import Path

    from stepctl.config import yaml
    from stepctl.rundir.directory import RunDirectory
    from stepctl.system import blas

    document = yaml.load(path)
    set_target(document, stop)
    document.set_all(assignments)
    blas.set_environment(*blas.requested_numerics(document.value))

    from stepctl.config.model import parse_config
    from stepctl.reports.plan import plan as plan_fresh
    from stepctl.system.closing import close_on_error
    from stepctl.training.build import prepare

    assembly = prepare(parse_config(document), say=say)
    with close_on_error(assembly):
        return plan_fresh(assembly, RunDirectory(Path("runs") / Path(path).stem)), assembly


def _plan_resume(
    path: str, stop: dict[str, int], assignments: tuple[str, ...]
) -> tuple[Plan, Assembly]:
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.records import read_records
    from stepctl.system import blas

    records = read_records(RunDirectory(path))
    document = records.document.with_assignments(assignments)
    blas.set_environment(*blas.requested_numerics(document.value))

    from stepctl.reports.plan import plan_resume
    from stepctl.runs.at_step import ResumeOptions

    options = ResumeOptions(
        document=document if assignments else None,
        assignments=assignments,
        stop=stop_config(stop),
    )
    return plan_resume(records, options, say)


def print_plan(plan: Plan, as_json: bool) -> None:
    """Print a plan to stdout."""
    if as_json:
        echo_json(plan)
        return
    lines = [
        *_sizes(plan),
        *_steps(plan),
        *_kept_checkpoints(plan["checkpoints"]),
        *_learning_rates(plan["learning_rate"]),
    ]
    for line in lines:
        echo(printable(line))
    for note in plan["notes"]:
        echo(printable(f"note: {note}"))


def _sizes(plan: Plan) -> Iterator[str]:
    yield f"run directory  {plan['run_dir']}"
    if "samples" in plan:
        yield from _model_sizes(plan)
    for path, shape in plan.get("state", {}).items():
        yield f"  {path:<24} {tuple(shape)}  state"
    sizes = plan["bytes"]
    gradients = f", {sizes['gradients']:,} of gradients" if "samples" in plan else ""
    yield f"memory         {sizes['state']:,} bytes of state{gradients}"
    yield f"checkpoint     {sizes['checkpoint']:,} bytes"


def _model_sizes(plan: Plan) -> Iterator[str]:
    from stepctl.reports.columns import listed

    samples = plan["samples"]
    n_samples = f"{samples['training']} training, {samples['validation']} validation"
    yield f"samples        {n_samples}, of shape {tuple(samples['shape'])}"
    if "columns" in plan:
        yield f"columns        {listed(plan['columns'])}"
    if "class_names" in plan:
        yield f"classes        {listed(plan['class_names'])}"
    groups = plan.get("groups", {})
    for name, shape in plan["parameters"].items():
        line = f"  {name:<24} {tuple(shape)}"
        if name in groups:
            line += f"  {_group(groups[name])}"
        yield line
    for name, shape in plan["buffers"].items():
        yield f"  {name:<24} {tuple(shape)}  buffer"
    yield f"parameters     {plan['n_parameters']:,}"


def _group(settings: GroupSettings) -> str:
    if settings["frozen"]:
        return "frozen"
    text = f"weight decay {settings['weight_decay']}"
    multiplier = settings["learning_rate_multiplier"]
    return text if multiplier == 1 else f"{text}, learning rate times {multiplier}"


def _steps(plan: Plan) -> Iterator[str]:
    start, last = plan["steps"]
    steps = f"steps          {start} to {last}"
    if "from" in plan and start >= last:
        steps += ": nothing to do (to continue: --num-steps N)"
    yield steps
    if "from" in plan:
        target = plan["plain_target"]
        yield f"from           {plan['from']}; a resume without options trains to step {target}"
    for name, event in plan["events"].items():
        yield f"{name:<15}{event['words']}"


def _kept_checkpoints(kept: KeptCheckpoints) -> Iterator[str]:
    rules = []
    for key, value in (("keep_last", kept["keep_last"]), ("keep_every", kept["keep_every"])):
        if value is not None:
            rules.append(f"{key} {value}")
    best = kept["keep_best"]
    up_to = ""
    if best is not None:
        rules.append(f"keep_best {best['metric']}:{best['mode']}:{best['n']}")
        up_to = "up to "
    at_end = f"{kept['at_end']:,} at the end: {kept['bytes_at_end']:,} bytes"
    yield f"kept           {up_to}{at_end} ({', '.join(rules) or 'all'})"
    yield f"               at most {kept['at_most']:,} at a time: {kept['bytes_at_most']:,} bytes"


def _learning_rates(tables: dict[str, RateTable]) -> Iterator[str]:
    for key, table in tables.items():
        points = table["rates"]
        if not points:
            continue
        title = f"{key}, of the update from a global step to the next"
        if any(point["turns"] for point in points):
            title += " (*: a landmark of the schedule)"
        yield title
        for point in points:
            line = f"  {point['step']:<12} {point['value']:.6g}"
            if point["turns"]:
                line += "  *"
            yield line
