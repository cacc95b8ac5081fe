"""`stepctl fork`: start a new run from a checkpoint of another."""

import click

from stepctl.cli.options import (
    json_option,
    set_option,
    set_target,
    stop_section,
    target_options,
)
from stepctl.cli.output import echo_json
from stepctl.cli.parameter_types import Place, WholeNumber
from stepctl.system.shell import command
from stepctl.system.terminal import say


@click.command()
@click.argument("run_dir", type=Place(folder=True, run=True), metavar="RUN")
@click.option(
    "--at", type=WholeNumber(), metavar="N", help="The global step (default: the newest)."
)
@click.option(
    "--run-dir",
    "new_dir",
    required=True,
    type=Place(folder=True),
    metavar="NEW",
    help="The directory of the new run.",
)
@set_option
@target_options
@json_option("the new run")
def fork(
    run_dir: str,
    at: int | None,
    new_dir: str,
    assignments: tuple[str, ...],
    num_steps: int | None,
    last_step: int | None,
    as_json: bool,
) -> None:
    """Start a new run from a checkpoint of RUN.

    Nothing is trained. The config is RUN's with the changes of --set. Any key may change if the
    checkpoint's arrays and counters still fit. RUN keeps the checkpoint from then on. Train with
    `stepctl resume NEW`.
    """
    import copy

    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.records import is_script, read_records
    from stepctl.system import blas

    stop = stop_section(num_steps, last_step)
    parent = RunDirectory(run_dir)
    parent.refuse_missing_run()
    with parent.lock(say):
        records = read_records(parent)
        document = copy.deepcopy(records.document)
        set_target(document, stop)
        document.set_all(assignments)
        blas.set_environment(*blas.requested_numerics(document.value))

        from stepctl.runs.fork import ForkOptions
        from stepctl.runs.fork import fork as fork_run

        options = ForkOptions(at, document if stop or assignments else None)
        forked = fork_run(records, RunDirectory(new_dir), options, say)
    resume = command("resume", new_dir)
    if is_script(records):
        resume = f"its script, given {new_dir} as run directory"
    elif forked.stopped:
        resume += f" ... ({forked.stopped})"
    elif forked.target <= forked.step:
        resume += f" --num-steps N (its target, step {forked.target}, is reached)"
    if as_json:
        echo_json(
            {
                "run": new_dir,
                "step": forked.step,
                "target": forked.target,
                "forked_from": run_dir,
                "stopped": forked.stopped,
            }
        )
    say(f"{new_dir}: global step {forked.step}, forked from {run_dir}; continue with: {resume}")
