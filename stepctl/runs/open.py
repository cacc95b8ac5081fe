"""Creating a run, and resuming one: both yield a segment that is ready to train."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from stepctl import __version__
from stepctl.checkpoint.expected import pending_set_aside
from stepctl.config.changes import find_changes, refuse_locked_changes, refuse_unknown_keys
from stepctl.config.model import Config, ScriptConfig
from stepctl.config.registry import has_user_components
from stepctl.distributed.comm import SINGLE_PROCESS, Comm
from stepctl.errors import UnreadableError
from stepctl.hooks.base import Hook
from stepctl.rundir import series
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger, new_run_id
from stepctl.rundir.series import series_folder
from stepctl.runs.at_step import (
    ResumeOptions,
    RunAtStep,
    RunFiles,
    changed_config,
    horizon_notes,
    open_at_step,
    read_run,
    target_of,
)
from stepctl.runs.compatibility import (
    Changes,
    StartFacts,
    changed_keys,
    check_data,
    check_numerics,
    config_for_watches,
    counters_may_differ,
    moved_files,
)
from stepctl.runs.messages import Say, silent
from stepctl.runs.records import RunRecords, lock_records, refuse_script
from stepctl.runs.segment import Segment
from stepctl.system import shell
from stepctl.training.assembly import Assembly
from stepctl.training.build import assemble, prepare
from stepctl.training.determinism import find_difference


@contextlib.contextmanager
def create_run(
    config: Config,
    directory: RunDirectory,
    say: Say = silent,
    hooks: Sequence[Hook] = (),
    comm: Comm = SINGLE_PROCESS,
    *,
    take_over: bool = False,
) -> Iterator[Segment]:
    """Create a run and hold its lock; an error leaves nothing behind.

    With `take_over` the mirror is claimed even if its owner may be alive. RunExistsError if a run is
    there, or in the mirror.
    """
    directory.refuse_run()
    assembly = prepare(config, hooks, comm, say)
    with (
        contextlib.closing(assembly),
        start_segment(assembly, directory, say, take_over=take_over) as segment,
    ):
        yield segment


@contextlib.contextmanager
def start_segment(
    assembly: Assembly, directory: RunDirectory, say: Say, *, take_over: bool = False
) -> Iterator[Segment]:
    """Create the directory of a new run, and yield its first segment.

    RunExistsError if there is a run in the directory, or in the mirror.
    """
    # The fingerprint may read all data. Compute it now, while a signal still ends the command at once.
    assembly.data_fingerprint()
    config = assembly.config
    target = config.target(config.initial_step)
    difference = find_difference(assembly)
    if difference is not None:
        say(f"warning: {difference}")
    if config.mirror is not None:
        from stepctl.mirror.claimed import refuse_mirrored_run

        refuse_mirrored_run(config.mirror.url)
    with new_run_directory(directory, config, say) as run_id:
        for note in horizon_notes(assembly, target, locked=False):
            say(f"note: {note}")
        yield Segment(directory, assembly, say, run_id=run_id, target=target, take_over=take_over)


@contextlib.contextmanager
def new_run_directory(directory: RunDirectory, config: Config, say: Say) -> Iterator[str]:
    """Make the directory of a new run, lock it, write its config, and yield the run's id.

    RunExistsError if a run began there meanwhile.
    """
    directory.create()
    with directory.lock(say):
        directory.refuse_run()
        directory.remove_temporary_files()
        directory.remove_unfinished_start()
        directory.write_config(config.text)
        yield new_run_id()


@contextlib.contextmanager
def resume_run(
    directory: RunDirectory,
    options: ResumeOptions,
    say: Say = silent,
    hooks: Sequence[Hook] = (),
    comm: Comm = SINGLE_PROCESS,
) -> Iterator[Segment]:
    """Lock a run, and restore its newest good checkpoint, or the one of `from_step`."""
    with (
        lock_records(directory, say) as records,
        resume_locked(records, options, say, hooks, comm) as segment,
    ):
        yield segment


@contextlib.contextmanager
def resume_locked(
    records: RunRecords,
    options: ResumeOptions,
    say: Say = silent,
    hooks: Sequence[Hook] = (),
    comm: Comm = SINGLE_PROCESS,
    build: Callable[[Config], Assembly] | None = None,
) -> Iterator[Segment]:
    """Restore the newest good checkpoint of a locked run, or the one of `from_step`.

    `build` returns the assembly of a config, by default with these hooks and ranks.
    """
    if build is None:
        refuse_script(records)
        build = partial(assemble, hooks=hooks, comm=comm, restored=True)
    run = read_run(records)
    config = changed_config(run, options)
    changes = find_changes(run.config, config)
    refuse_unknown_keys(options.allow_change, run.config, config)
    moved = moved_files(changes, config, run.ledger)
    refuse_locked_changes(
        [change for change in changes if change not in moved],
        options.allow_change,
        in_script=isinstance(config, ScriptConfig),
    )
    with contextlib.closing(build(config)) as assembly:
        allowed = assembly.data_section in options.allow_change
        check_data(assembly, run.ledger, moved, say, allowed=allowed)
        _report_moved(moved, say)
        if options.from_step is None:  # else the newer order replaces an unfinished one
            run.store.set_aside_all(pending_set_aside(run.ledger))
        at = _restore(run, assembly, options, changes, say)
        if changes or has_user_components():  # otherwise the first segment made the same trial
            assembly.trial()
        run_id, ledger = _acknowledge(run, at)
        for watch in assembly.reset_changed_watches(config_for_watches(at.header, run.config)):
            say(f"note: {watch} is reset: its criterion changed")
        target = target_of(run, config, options.stop, at.step, changes)
        for note in horizon_notes(assembly, target, locked=True):
            say(f"note: {note}")
        facts = _start_facts(at, options, say)
        if changes:
            facts |= {"changes": changes, "config": config.plain()}
        yield Segment(
            run.directory,
            assembly,
            say,
            run_id=run_id,
            target=target,
            ledger=ledger,
            restored=at.file,
            facts=facts,
            going_back=options.from_step is not None,
            strict=options.strict_numerics,
            take_over=options.take_over,
            claimed=options.claimed,
        )


def _report_moved(moved: Changes, say: Say) -> None:
    if moved:
        paths = ", ".join(
            f"{change['key']}: {change['old']} -> {change['new']}" for change in moved
        )
        say(f"note: the data have moved, and are unchanged ({paths})")


def _restore(
    run: RunFiles, assembly: Assembly, options: ResumeOptions, changes: Changes, say: Say
) -> RunAtStep:
    """Restore the checkpoint, and report config differences that this resume did not ask for."""
    data_files = assembly.config.data_files()
    may_differ = changed_keys(run.ledger, changes) | set(options.allow_change) | data_files
    try:
        at = open_at_step(
            run,
            lambda step: assembly,
            step=options.from_step,
            say=say,
            may_differ=may_differ,
            counters_may_differ=counters_may_differ(may_differ),
        )
    except UnreadableError as error:
        if options.from_step is not None:
            raise
        older = shell.command("resume", run.directory.path, "--from-step", "N")
        raise UnreadableError(
            f"{error}; or go back to an older checkpoint with: {older}"
        ) from error
    asked = {change["key"] for change in changes} | data_files
    for key, message in at.differences.items():
        if key not in asked:
            say(message)
    return at


def _acknowledge(run: RunFiles, at: RunAtStep) -> tuple[str, Ledger]:
    """Record the restored checkpoint if a kill came before its ledger line.

    Returns the run's id and the ledger.
    """
    ledger = run.ledger
    # neither: format version 1 began the run, or the ledger is lost
    run_id = ledger.run_id or at.header.run_id or new_run_id()
    if at.step in ledger.acknowledged.values():
        return run_id, ledger
    facts: dict[str, Any] = {"file": at.file, "sha256": at.header.sha256, "pruned": []}
    folder = series_folder(run.directory)
    rows = {name: series.count_rows(folder, name, at.step) for name in series.names(folder)}
    if rows:
        facts["series"] = rows
    run.directory.append_ledger("checkpoint", step=at.step, **facts)
    return run_id, run.directory.read_ledger()


def _start_facts(at: RunAtStep, options: ResumeOptions, say: Say) -> StartFacts:
    header = at.header
    facts = check_numerics(
        header.numerics, at.assembly.numerics, say, strict=options.strict_numerics
    )
    here = f"stepctl {__version__}"
    if header.created_by != here:
        say(
            f"note: {at.file} was written by {header.created_by}, this is {here}; the ledger "
            "records it"
        )
        facts["version_before"] = header.created_by
    return facts
