"""`stepctl train`: start a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import click

from stepctl.cli.interrupts import hold_signals
from stepctl.cli.options import (
    json_option,
    max_time_option,
    mirror_options,
    set_mirror,
    set_option,
    set_target,
    stop_section,
    target_options,
    verbosity_options,
)
from stepctl.cli.output_queue import queue_output
from stepctl.cli.parameter_types import Place
from stepctl.cli.plan import print_plan
from stepctl.cli.ranks import join_job, set_numerics
from stepctl.cli.segment import train_segment
from stepctl.errors import RunExistsError
from stepctl.system import store_url
from stepctl.system.terminal import say

if TYPE_CHECKING:
    from stepctl.config.yaml import Document
    from stepctl.distributed.comm import Comm
    from stepctl.mirror.claimed import ClaimedMirror
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.segment import Segment

    TrainToTarget = Callable[[Segment], NoReturn]


@click.command()
@click.argument("file", type=Place(), metavar="[FILE]", required=False)
@click.option(
    "--config",
    "config_option",
    type=Place(),
    metavar="FILE",
    help="The config, instead of the argument.",
)
@click.option(
    "--run-dir",
    type=Place(folder=True),
    metavar="DIR",
    help="The directory of the run (default: runs/<config name>).",
)
@set_option
@target_options
@max_time_option
@mirror_options
@click.option(
    "--or-resume",
    is_flag=True,
    help="Resume the run if it exists, here or in the mirror, so that a scheduler can repeat the "
    "same command.",
)
@click.option("--dry-run", is_flag=True, help="Build everything and print the plan; do not train.")
@json_option("how the run ended (step, reason, metrics, checkpoint), or the plan of --dry-run,")
@verbosity_options
def train(
    file: str | None,
    config_option: str | None,
    run_dir: str | None,
    assignments: tuple[str, ...],
    num_steps: int | None,
    last_step: int | None,
    max_time: float | None,
    mirror: str | None,
    take_over: bool,
    or_resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Start a run from a config.

    FILE is a YAML config. The run is trained to its target.
    """
    began = time.monotonic()
    config_path = _config_path(file, config_option)
    if not dry_run:
        hold_signals()
        queue_output()
    comm = join_job()
    from pathlib import Path

    from stepctl.config import yaml
    from stepctl.rundir.directory import RunDirectory
    from stepctl.system import blas

    document = yaml.load(config_path)
    set_target(document, stop_section(num_steps, last_step))
    document.set_all(assignments)
    set_mirror(document, mirror)
    directory = RunDirectory(run_dir or Path("runs") / Path(config_path).stem)
    train_to_target = partial(
        train_segment,
        began=began,
        max_time=max_time,
        quiet=quiet,
        verbose=verbose,
        as_json=as_json,
    )
    if or_resume and not dry_run:
        if directory.holds_run():
            _resume(directory, document, comm, train_to_target, take_over)
        with _fetched(directory, document, take_over) as claimed:
            if claimed is not None:
                _resume(directory, document, comm, train_to_target, take_over, claimed)
    set_numerics(comm, blas.requested_numerics(document.value))

    from stepctl.config.model import parse_config
    from stepctl.reports.plan import plan
    from stepctl.runs.at_step import ResumeOptions
    from stepctl.runs.open import create_run, resume_run
    from stepctl.training.build import prepare

    config = parse_config(document)
    if dry_run:
        directory.refuse_foreign_files()
        with contextlib.closing(prepare(config, comm=comm, say=say)) as assembly:
            print_plan(plan(assembly, directory), as_json)
        return
    try:
        with create_run(config, directory, say, comm=comm, take_over=take_over) as segment:
            train_to_target(segment)
    except RunExistsError:  # another job created it after `holds_run`
        if not or_resume:
            raise
        options = ResumeOptions(document=document, take_over=take_over)
        with resume_run(directory, options, say, comm=comm) as segment:
            train_to_target(segment)


def _fetched(
    directory: RunDirectory, document: Document, take_over: bool
) -> contextlib.AbstractContextManager[ClaimedMirror | None]:
    """Fetch the run of the config's mirror, if it holds one."""
    url = store_url.mirror_of(document.value)
    if url is None:
        return contextlib.nullcontext()  # the validation of the config reports a wrong URL
    from stepctl.mirror.claimed import pulled_run

    return pulled_run(url, directory, say, take_over=take_over)


def _resume(
    directory: RunDirectory,
    document: Document,
    comm: Comm,
    train_to_target: TrainToTarget,
    take_over: bool,
    claimed: ClaimedMirror | None = None,
) -> NoReturn:
    from stepctl.runs.records import lock_records
    from stepctl.system import blas

    with lock_records(directory, say) as records:
        set_numerics(comm, blas.requested_numerics(records.document.value))

        from stepctl.runs.at_step import ResumeOptions
        from stepctl.runs.open import resume_locked

        options = ResumeOptions(document=document, take_over=take_over, claimed=claimed)
        with resume_locked(records, options, say, comm=comm) as segment:
            train_to_target(segment)


def _config_path(file: str | None, option: str | None) -> str:
    if file is not None and option is not None:
        raise click.UsageError(f"two configs: {file} and --config {option}; give one")
    path = file or option
    if path is None:
        raise click.UsageError(
            "no config: give a YAML file, such as: stepctl train configs/quickstart.yaml"
        )
    return path
