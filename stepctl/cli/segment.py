"""Training one segment from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import click

from stepctl.errors import Exit
from stepctl.system import interrupt
from stepctl.system.shell import command
from stepctl.system.terminal import say
from stepctl.system.text import local_step_note

if TYPE_CHECKING:
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.open_segment import Outcome
    from stepctl.runs.segment import Segment


def train_segment(
    segment: Segment,
    *,
    began: float,
    max_time: float | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> NoReturn:
    """Train to the segment's target, show the progress, and exit with 0 or 75.

    `max_time`, in seconds, counts from `began`, a time of `time.monotonic`. `as_json` prints the
    result to stdout.
    """
    run = segment.directory.path
    start = segment.start
    if segment.nothing_to_do is not None:
        segment.mirror_finished()
        report_finished(segment.directory, segment.nothing_to_do, as_json)
        raise click.exceptions.Exit(Exit.DONE)
    if interrupt.was_received():
        raise KeyboardInterrupt
    if not quiet:
        source = segment.restored or "the initial state"
        say(f"{run}: global step {start} to {segment.target}, from {source}")
    from stepctl.runs.progress import show_progress
    from stepctl.stopping.rules import TimeLimit

    if not quiet and segment.config.checkpoint.keep_best is not None:
        from stepctl.reports.kept_checkpoints import PlannedSteps, keep_best_notes

        planned = PlannedSteps(start, segment.target, segment.store.steps())
        for note in keep_best_notes(segment.assembly, planned):
            say(f"note: {note}")
    stop_rules = []
    if max_time is not None:
        stop_rules.append(TimeLimit(max_time, began))
    with show_progress(segment, quiet=quiet, verbose=verbose) as progress:
        outcome = segment.train(progress.writers, progress.hooks, stop_rules, progress.messages)
    if as_json:
        _print_result(
            segment.directory, outcome.reason.text, outcome.reason.done, outcome.step - start
        )
    _exit_with(outcome, segment, quiet)


def report_finished(directory: RunDirectory, message: str, as_json: bool) -> None:
    """Report that a run is finished, and no step was made."""
    say(f"{directory.path}: {message}")
    if as_json:
        _print_result(directory, message, True, 0)


def _print_result(directory: RunDirectory, reason: str, done: bool, local_step: int) -> None:
    from stepctl.cli.output import echo_json
    from stepctl.reports.segment_result import segment_result

    echo_json(segment_result(directory, reason=reason, done=done, local_step=local_step))


def _exit_with(outcome: Outcome, segment: Segment, quiet: bool) -> NoReturn:
    """Report how the segment ended; exit with 0 if the run is done, else with 75."""
    run = segment.directory.path
    reason = outcome.reason
    if outcome.waits and not quiet:
        waits = f"at {outcome.waits} of {outcome.saves} saves"
        say(f"{run}: waited {outcome.wait_seconds:.1f} s for the previous save to finish, {waits}")
    if reason.done and outcome.step >= segment.target:
        if not quiet:
            note = local_step_note(outcome.step, outcome.start)
            say(f"{run}: done at global step {outcome.step}{note}")
        raise click.exceptions.Exit(Exit.DONE)
    remedy = reason.remedy or f"continue with: {command('resume', run)}"
    say(f"{run}: stopped at global step {outcome.step} ({reason.text}); {remedy}")
    raise click.exceptions.Exit(Exit.DONE if reason.done else Exit.STOPPED)
