"""Pruning: removing checkpoints of a run that no process trains."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from stepctl.checkpoint import names, retention
from stepctl.checkpoint.expected import missing_checkpoints, pending_set_aside
from stepctl.checkpoint.store import Store
from stepctl.config.model import CheckpointConfig
from stepctl.errors import CheckpointError, ConfigError, StepctlError, printable
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.runs.messages import Say
from stepctl.system.files import is_disk_full
from stepctl.writers.evaluation_history import EvaluationHistory


def prune(
    directory: RunDirectory, changed_rules: Mapping[str, Any], say: Say, *, dry_run: bool
) -> list[int]:
    """Remove the good checkpoints that the retention rules do not keep; return their steps.

    The rules are keys of the config's `checkpoint` section; `changed_rules` override them. The
    newest good checkpoint stays, and so do those with forks, which is reported. Damaged files are
    reported and left in place. CheckpointError if no checkpoint is good, RunInUseError if a process
    trains the run, UnreadableError if a checkpoint cannot be read now.
    """
    directory.refuse_missing_run()
    with contextlib.nullcontext() if dry_run else directory.lock(say):
        ledger = directory.read_ledger()
        keep = _retention_rules(directory, ledger, changed_rules)
        store = Store(directory.checkpoint_folder, lambda: ledger)
        if not dry_run:
            store.set_aside_all(pending_set_aside(ledger))
        evaluations = EvaluationHistory(directory.read_metrics("eval")).rows
        best = keep.keep_best
        if best is not None and not any(best.metric in row for row in evaluations.values()):
            shown = directory.display_path(directory.metrics)
            raise ConfigError(f"keep_best: {shown} has no evaluation with {best.metric!r}")
        good = _good_steps(store, say)
        pruned = retention.to_prune(good, keep, evaluations, ledger.forks)
        for step in retention.to_prune(good, keep, evaluations):
            if step not in pruned:
                children = printable(", ".join(dict.fromkeys(ledger.forks[step])))
                say(
                    f"{names.file_name(step)} is kept, because these runs were forked from it: "
                    f"{children}"
                )
        if pruned and not dry_run:
            _remove(directory, store, pruned)
    return pruned


def forget_missing(directory: RunDirectory, say: Say, *, dry_run: bool) -> list[int]:
    """Record that missing checkpoints are not expected any more; return their steps.

    RunInUseError if a process trains the run; UnreadableError if the checkpoints cannot be listed
    now.
    """
    directory.refuse_missing_run()
    with contextlib.nullcontext() if dry_run else directory.lock(say):
        missing = missing_checkpoints(directory, directory.read_ledger())
        if missing and not dry_run:
            directory.append_ledger("prune", steps=missing, missing=True)
    return missing


def _retention_rules(
    directory: RunDirectory, ledger: Ledger, changed: Mapping[str, Any]
) -> CheckpointConfig:
    """Return the config's `checkpoint` section as changed; other sections are not checked."""
    section = directory.newest_config(ledger).value.get("checkpoint")
    keys = section if isinstance(section, dict) else {}
    try:
        return CheckpointConfig(**{**keys, **changed})
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{directory.display_path(directory.config)}: checkpoint: {reason}"
        ) from error


def _good_steps(store: Store, say: Say) -> list[int]:
    """Return the steps of the good checkpoints, in ascending order; report damaged ones."""
    newest = store.newest(say)
    newest.close()
    good = []
    for step in store.steps():
        if step > newest.header.global_step:
            continue
        try:
            store.open_verified(step).file.close()
        except CheckpointError as error:
            say(f"{error}; left in place")
        else:
            good.append(step)
    return good


def _remove(directory: RunDirectory, store: Store, pruned: list[int]) -> None:
    """Record the steps in the ledger, then remove their files.

    A full disk may have no room for the line before a file is gone: then the oldest file is removed
    first, and the line is tried again.
    """
    for step in pruned:
        try:
            directory.append_ledger("prune", steps=pruned)
            break
        except StepctlError as error:
            if not is_disk_full(error):
                raise
            store.remove([step])
    else:
        directory.append_ledger("prune", steps=pruned)
    store.remove(pruned)
