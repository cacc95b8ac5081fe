"""`stepctl resume`: go on with a run."""

from __future__ import annotations

import time

import click

from stepctl.cli.options import (
    Place,
    Steps,
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


@click.command()
@click.argument("run_dir", type=Place(folder=True), metavar="RUN")
@target_options
@max_time_option
@click.option("--from-step", type=Steps(min=0), metavar="N", help="Go back to this step's checkpoint.")
@set_option
@click.option("--allow-change", multiple=True, metavar="KEY", help="Let --set change a locked key.")
@click.option("--strict-numerics", is_flag=True, help="Refuse where the machine cannot give the same bits.")
@talk_options
def resume(
    run_dir: str,
    num_steps: int | None,
    last_step: int | None,
    max_time: float | None,
    from_step: int | None,
    assignments: tuple[str, ...],
    allow_change: tuple[str, ...],
    strict_numerics: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Go on with RUN from its newest good checkpoint, to its newest target or to the one given here."""
    began = time.monotonic()
    hold_signals()
    queue_output()
    comm = joined()
    from stepctl import numerics
    from stepctl.rundir import RunDirectory

    stop = stop_section(num_steps, last_step)
    directory = RunDirectory(run_dir)
    document = directory.newest_config()
    document.set_all(assignments)
    pin(comm, numerics.asked_for(document.value))

    from stepctl import run
    from stepctl.config import Stop

    options = run.ResumeOptions(
        assignments=assignments,
        allow_change=allow_change,
        stop=Stop.model_validate(stop) if stop else None,
        from_step=from_step,
        strict_numerics=strict_numerics,
    )
    with run.resume(directory, options, say, comm=comm) as segment:
        train_segment(segment, began=began, max_time=max_time, quiet=quiet, verbose=verbose)
