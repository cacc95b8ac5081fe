"""`stepctl resume`: continue a run."""

import contextlib
import time

import click

from stepctl.cli.collection import settle, suspend_collection
from stepctl.cli.interrupts import hold_signals
from stepctl.cli.mirror_url import fetched_run, place_of
from stepctl.cli.options import (
    json_option,
    max_time_option,
    mirror_options,
    set_mirror,
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
from stepctl.system import store_url
from stepctl.system.terminal import say


@click.command()
@click.argument("run_dir", type=Place(folder=True, run=True), metavar="RUN")
@click.option(
    "--run-dir",
    "fetched_to",
    type=Place(folder=True),
    metavar="DIR",
    help="If RUN is a URL, the directory of the run here (default: runs/<last part of the URL>).",
)
@target_options
@max_time_option
@mirror_options
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
    fetched_to: str | None,
    num_steps: int | None,
    last_step: int | None,
    max_time: float | None,
    mirror: str | None,
    take_over: bool,
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
    RUN may be the URL of a mirror: the run is fetched from there, unless it is here already.
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
    with contextlib.ExitStack() as held:
        claimed = None
        if store_url.is_url(run_dir):
            mirror, run_dir = place_of(run_dir, mirror, fetched_to)
            claimed = held.enter_context(
                fetched_run(mirror, RunDirectory(run_dir), from_step, take_over=take_over)
            )
        elif fetched_to is not None:
            raise click.UsageError(f"--run-dir is for the URL of a mirror; resume {run_dir} itself")
        records = held.enter_context(lock_records(RunDirectory(run_dir), say))
        document = records.document
        if assignments or mirror:
            document = document.with_assignments(assignments)
            set_mirror(document, mirror)
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
            document=document if assignments or mirror else None,
            assignments=assignments,
            allow_change=allow_change,
            stop=stop_config(stop),
            from_step=from_step,
            strict_numerics=strict_numerics,
            take_over=take_over,
            claimed=claimed,
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
