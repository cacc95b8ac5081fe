"""Removing checkpoints of a run that nobody trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from stepctl import rundir
from stepctl.checkpoint import names, retention
from stepctl.checkpoint.expected import missing_checkpoints, pending_set_aside
from stepctl.checkpoint.store import Store
from stepctl.config import Checkpoint
from stepctl.errors import CheckpointError, ConfigError, StepctlError, printable
from stepctl.rundir import RunDirectory
from stepctl.writers.evaluations import Evaluations


def prune(directory: RunDirectory, keep: Checkpoint, say: Callable[[str], None], *, dry_run: bool) -> list[int]:
    """Remove the good checkpoints that `keep` does not keep; return their steps.

    The newest good one stays, and those that forks began at, which is said. Damaged files are reported, left in
    place, and count for nothing. CheckpointError if none is good, RunInUseError if a process trains the run,
    UnreadableError if one cannot be read now.
    """
    with contextlib.nullcontext() if dry_run else directory.lock(say):
        store = Store(directory.checkpoint_folder, directory.records)
        if not dry_run:
            store.set_aside_all(pending_set_aside(directory.read_ledger()))
        evaluations = Evaluations(directory.read_metrics())
        if (best := keep.keep_best) and not any(best.metric in row for row in evaluations.rows.values()):
            raise ConfigError(f"keep_best: {directory.shown(directory.metrics)} has no evaluation with {best.metric!r}")
        newest = store.newest(say)
        newest.close()
        good = [step for step in store.steps() if step <= newest.header.global_step and _is_whole(store, step, say)]
        forks = rundir.forks(directory.read_ledger())
        pruned = retention.to_prune(good, keep, evaluations.rows, forks)
        for step in sorted({*retention.to_prune(good, keep, evaluations.rows)} - {*pruned}):
            children = printable(", ".join(dict.fromkeys(forks[step])))
            say(f"{names.file_name(step)} is kept for what was forked from it: {children}")
        if pruned and not dry_run:
            _remove(directory, store, pruned)
    return pruned


def forget_missing(directory: RunDirectory, say: Callable[[str], None], *, dry_run: bool) -> list[int]:
    """Acknowledge in the ledger that checkpoints are gone which it says are there; return their steps.

    RunInUseError if a process trains the run; UnreadableError if it cannot be told now what is there.
    """
    with contextlib.nullcontext() if dry_run else directory.lock(say):
        missing = missing_checkpoints(directory.read_ledger, Store(directory.checkpoints).steps)
        if missing and not dry_run:
            directory.append_ledger("prune", steps=missing, missing=True)
    return missing


def _remove(directory: RunDirectory, store: Store, pruned: list[int]) -> None:
    # The ledger's line comes first: what is gone is then known to be meant. A full disk has no room for it before
    # some file is gone: the oldest goes, and the line is tried again before the next one does.
    for step in pruned:
        try:
            directory.append_ledger("prune", steps=pruned)
            break
        except StepctlError as error:
            if not rundir.is_full(error):
                raise
            store.remove([step])
    else:
        directory.append_ledger("prune", steps=pruned)
    store.remove(pruned)


def _is_whole(store: Store, step: int, say: Callable[[str], None]) -> bool:
    try:
        verified = store.verified(step)
    except CheckpointError as error:
        say(f"{error}; left in place")
        return False
    verified.file.close()
    return True
