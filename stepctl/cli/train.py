"""`stepctl train`: start a run."""

from __future__ import annotations

import time
from pathlib import Path

import click

from stepctl.cli.options import (
    Place,
    hold_signals,
    joined,
    max_time_option,
    pin,
    say,
    set_option,
    stop_section,
    talk_options,
    target_options,
    train_segment,
)
from stepctl.cli.output import queue_output
from stepctl.cli.plan import print_plan
from stepctl.errors import RunExistsError


@click.command()
@click.argument("file", type=Place(), metavar="[FILE]", required=False)
@click.option("--config", "config_option", type=Place(), metavar="FILE", help="The config, in place of the argument.")
@click.option(
    "--run-dir",
    type=Place(folder=True),
    metavar="DIR",
    help="Where the run is kept; runs/<config name> if not given.",
)
@set_option
@target_options
@max_time_option
@click.option("--or-resume", is_flag=True, help="Go on with the run if there is one: one line for a scheduler.")
@click.option("--dry-run", is_flag=True, help="Build everything, train nothing, and print the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan of --dry-run as JSON.")
@talk_options
def train(
    file: str | None,
    config_option: str | None,
    run_dir: str | None,
    assignments: tuple[str, ...],
    num_steps: int | None,
    last_step: int | None,
    max_time: float | None,
    or_resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Start a run from a config, the YAML file FILE, and train it to its target."""
    began = time.monotonic()
    config_path = _config_path(file, config_option)
    if not dry_run:
        hold_signals()
        queue_output()
    comm = joined()
    from stepctl import numerics, yamlio
    from stepctl.rundir import RunDirectory

    if as_json and not dry_run:
        raise click.UsageError("--json prints the plan of --dry-run: give both")
    document = yamlio.load(config_path)
    stop = stop_section(num_steps, last_step)
    if stop is not None:
        section = document.value.get("stop")
        other = {} if not isinstance(section, dict) else section
        others = {key: value for key, value in other.items() if key not in ("last_step", "num_steps")}
        document.put("stop", others | stop, "--num-steps" if "num_steps" in stop else "--last-step")
    document.set_all(assignments)
    directory = RunDirectory(run_dir or Path("runs") / Path(config_path).stem)
    resuming = or_resume and not dry_run and directory.holds_run()
    pin(comm, numerics.asked_for(directory.newest_config().value if resuming else document.value))

    from stepctl import config as configs
    from stepctl import run
    from stepctl.assembly import prepare
    from stepctl.plan import plan

    def go_on() -> None:
        with run.resume(directory, run.ResumeOptions(document=document), say, comm=comm) as segment:
            train_segment(segment, began=began, max_time=max_time, quiet=quiet, verbose=verbose)

    if resuming:
        go_on()
    config = configs.parse(document)
    if dry_run:
        directory.refuse_strangers()
        print_plan(plan(prepare(config, comm=comm, say=say), directory), as_json)
        return
    try:
        with run.create(config, directory, say, comm=comm) as segment:
            train_segment(segment, began=began, max_time=max_time, quiet=quiet, verbose=verbose)
    except RunExistsError:  # one that began since we looked
        if not or_resume:
            raise
        go_on()


def _config_path(file: str | None, option: str | None) -> str:
    if file is not None and option is not None:
        raise click.UsageError(f"two configs: {file} and --config {option}; give one")
    path = option if file is None else file
    if path is None:
        raise click.UsageError("no config: give a YAML file, such as: stepctl train configs/quickstart.yaml")
    return path
