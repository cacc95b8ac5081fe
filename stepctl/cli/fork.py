"""`stepctl fork`: a new run from a step of an old one."""

from __future__ import annotations

import click

from stepctl.cli.options import Place, Steps, say, set_option, stop_assignments, target_options
from stepctl.shell import command


@click.command()
@click.argument("run_dir", type=Place(folder=True), metavar="RUN")
@click.option("--at", type=Steps(min=0), metavar="N", help="The global step to start from; the newest if not given.")
@click.option(
    "--run-dir", "new_dir", required=True, type=Place(folder=True), metavar="NEW", help="Where the new run is kept."
)
@set_option
@target_options
def fork(
    run_dir: str,
    at: int | None,
    new_dir: str,
    assignments: tuple[str, ...],
    num_steps: int | None,
    last_step: int | None,
) -> None:
    """Start a new run from a checkpoint of RUN, with RUN's config and what --set changes; nothing is trained.

    Any key may change, as long as the arrays and counters of the checkpoint fit. The checkpoint stays in RUN from
    then on. `stepctl resume NEW` goes on with it.
    """
    from stepctl import numerics
    from stepctl.rundir import RunDirectory

    assignments = (*stop_assignments(num_steps, last_step), *assignments)
    parent = RunDirectory(run_dir)
    document = parent.newest_config()
    document.set_all(assignments)
    numerics.pin(*numerics.asked_for(document.value))

    from stepctl.fork import ForkOptions
    from stepctl.fork import fork as fork_run

    forked = fork_run(parent, RunDirectory(new_dir), ForkOptions(at, assignments), say)
    more = "" if forked.target > forked.step else f" --num-steps N (its target, step {forked.target}, is reached)"
    if forked.stopped:
        more = f" ... ({forked.stopped})"
    go_on = command("resume", new_dir)
    say(f"{new_dir}: global step {forked.step}, forked from {run_dir}; go on with: {go_on}{more}")
