"""`stepctl resume`: continue a run."""

import time

import click

from stepctl.cli.collection import settle, suspend_collection
from stepctl.cli.interrupts import hold_signals
from stepctl.cli.options import (
    json_option,
    max_time_option,
    set_option,
    stop_config,
    stop_section,
    target_options,
    verbosity_options,
)
from stepctl.cli.output_queue import queue_output
from stepctl.cli.parameter_types import Place, Setting, WholeNumber
from stepctl.cli.ranks import join_job, set_numerics
from stepctl.cli.segment import report_finished, train_segment
from stepctl.errors import Exit
from stepctl.system.terminal import say


@click.command()
@click.argument("run_dir", type=Place(folder=True, run=True), metavar="RUN")
@target_options
@max_time_option
@click.option(
    "--from-step",
    type=WholeNumber(),
    metavar="N",
    help="Go back to the checkpoint of this step.",
)
@set_option
@click.option(
    "--allow-change",
    multiple=True,
    type=Setting(with_value=False),
    metavar="KEY",
    help="Allow --set to change a locked key.",
)
@click.option(
    "--strict-numerics",
    is_flag=True,
    help="Refuse to continue if this machine cannot compute the same bits.",
)
@json_option("how the run ended (step, reason, metrics, checkpoint)")
@verbosity_options
def resume(
    run_dir: str,
    num_steps: int | None,
    last_step: int | None,
    max_time: float | None,
    from_step: int | None,
    assignments: tuple[str, ...],
    allow_change: tuple[str, ...],
    strict_numerics: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Continue a run.

    RUN continues from its newest good checkpoint, to its newest target or to the one given here.
    """
    began = time.monotonic()
    suspend_collection()
    hold_signals()
    queue_output()
    comm = join_job()
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.records import lock_records
    from stepctl.system import blas

    stop = stop_section(num_steps, last_step)
    with lock_records(RunDirectory(run_dir), say) as records:
        document = records.document
        if assignments:
            document = document.with_assignments(assignments)
        set_numerics(comm, blas.requested_numerics(document.value))

        is_plain = not (stop or assignments or allow_change or strict_numerics)
        if is_plain and from_step is None and comm.size == 1:
            from stepctl.runs.finished import describe_finished

            finished = describe_finished(records, say)
            if finished is not None:
                report_finished(records.directory, finished, as_json)
                raise click.exceptions.Exit(Exit.DONE)
        from stepctl.runs.at_step import ResumeOptions
        from stepctl.runs.open import resume_locked

        settle()
        options = ResumeOptions(
            document=document if assignments else None,
            assignments=assignments,
            allow_change=allow_change,
            stop=stop_config(stop),
            from_step=from_step,
            strict_numerics=strict_numerics,
        )
        with resume_locked(records, options, say, comm=comm) as segment:
            if assignments and segment.nothing_to_do is not None:
                say("note: the run is finished, so --set changes nothing")
            train_segment(
                segment,
                began=began,
                max_time=max_time,
                quiet=quiet,
                verbose=verbose,
                as_json=as_json,
            )
