"""Forking: a new run from a step of an existing one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from stepctl.checkpoint import codec, names
from stepctl.checkpoint.expected import pending_set_aside
from stepctl.checkpoint.store import Store
from stepctl.config.changes import find_changes
from stepctl.config.model import KEYS, Config, parse_config
from stepctl.config.yaml import Document
from stepctl.errors import ConfigError
from stepctl.hooks.base import Hook
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import RunAtStep, RunFiles, horizon_notes, open_at_step, read_run
from stepctl.runs.compatibility import Changes, config_for_watches
from stepctl.runs.messages import Say, silent
from stepctl.runs.open import new_run_directory
from stepctl.runs.records import RunRecords
from stepctl.stopping.base import first_reason
from stepctl.training.assembly import Assembly
from stepctl.training.build import assemble


@dataclass(frozen=True)
class ForkOptions:
    """The step to fork at (None: the newest good one), and the config (None: the run's newest)."""

    at: int | None = None
    document: Document | None = None


@dataclass(frozen=True)
class Forked:
    """The step of the new run, and the target of a plain resume.

    `stopped` is the reason why such a resume would do nothing although the target is ahead; empty
    if it has work.
    """

    step: int
    target: int
    changes: Changes
    stopped: str = ""


def fork(
    records: RunRecords,
    child: RunDirectory,
    options: ForkOptions,
    say: Say = silent,
    hooks: Sequence[Hook] = (),
) -> Forked:
    """Start the run `child` with a checkpoint of a locked run.

    Both ledgers record the fork. ConfigError if the config is wrong, or `child` holds files;
    CheckpointError if the checkpoint is refused, or does not fit the config.
    """
    child.refuse_run()
    child.refuse_foreign_files()
    run = read_run(records)
    run.store.set_aside_all(pending_set_aside(run.ledger))
    asked = run.config if options.document is None else parse_config(options.document)
    if _has_mirror_of(run.config, asked):
        asked = asked.with_values({"mirror": None})
        say("note: the fork has no mirror: give it a URL of its own with --set mirror.url=URL")
    with contextlib.ExitStack() as built:
        at = open_at_step(
            run,
            lambda step: built.enter_context(
                contextlib.closing(_assemble(run.config, asked, step, hooks))
            ),
            step=options.at,
            say=say,
            may_differ=KEYS,
            skip_unfit=False,
        )
        for message in at.differences.values():
            say(message)
        assembly = at.assembly
        config = assembly.config
        changes = find_changes(run.config, config)
        for watch in assembly.reset_changed_watches(config_for_watches(at.header, run.config)):
            say(f"note: {watch} is reset: its criterion changed in the fork")
        _check_data(assembly, run, changes, say)
        assembly.trial()
        target = config.target(at.step)
        for note in horizon_notes(assembly, target, locked=False):
            say(f"note: {note}")
        with new_run_directory(child, config, say) as run_id:
            _record(run.directory, child, run_id, at, changes)
            new_numerics = _has_new_numerics(config, run.config)
            _publish(child, run_id, at, new_numerics=new_numerics)
    reason = first_reason(assembly.stop_rules(), assembly.state.counters)
    stopped = "" if reason is None else f"{reason.text}; {reason.remedy}"
    return Forked(at.step, target, changes, stopped)


def _has_mirror_of(parent: Config, config: Config) -> bool:
    """Tell whether a config has the parent's mirror, which holds one run."""
    if parent.mirror is None or config.mirror is None:
        return False
    return parent.mirror.url == config.mirror.url


def copy_at(run: RunFiles, child: RunDirectory, step: int, say: Say = silent) -> None:
    """Make a run of the checkpoint of `step` alone; unlike a fork, the run `run` keeps no record."""
    config = run.config.with_values({"mirror": None})
    at = open_at_step(
        run,
        lambda step: assemble(config),
        step=step,
        say=say,
        may_differ=KEYS,
        skip_unfit=False,
    )
    with contextlib.closing(at.assembly), new_run_directory(child, config, say) as run_id:
        _record_origin(run.directory, child, run_id, at, [])
        _publish(child, run_id, at, new_numerics=False)


def _assemble(parent: Config, config: Config, step: int, hooks: Sequence[Hook]) -> Assembly:
    target = config.target(step)
    open_keys = list(config.horizon_keys())
    if open_keys and target <= step:
        raise ConfigError(
            f"{open_keys[0]}: is missing, and the target {target} is not past step {step}; give one"
        )
    new_numerics = _has_new_numerics(config, parent)
    return assemble(config, hooks, target=target, record_numerics=new_numerics)


def _has_new_numerics(config: Config, parent: Config) -> bool:
    return config.numerics.deciding_bits() != parent.numerics.deciding_bits()


def _check_data(assembly: Assembly, run: RunFiles, changes: Changes, say: Say) -> None:
    """Check the data if they are not the parent's; warn if no config change asked for them."""
    asked = any(change["key"].startswith("data.") for change in changes)
    recorded = run.ledger.data
    same = recorded is None or assembly.has_data(recorded)
    if asked or not same:
        assembly.check_data(say)
    if not asked and not same:
        say(
            f"warning: {assembly.origins}: the data differ from the ones {run.directory.path} was trained on; "
            "the fork continues with them"
        )


def _record(
    parent: RunDirectory, child: RunDirectory, run_id: str, at: RunAtStep, changes: Changes
) -> None:
    # both before the child has a checkpoint: its step must not be pruned in the parent
    _record_origin(parent, child, run_id, at, changes)
    child_path = os.path.abspath(child.folder.path)
    parent.append_ledger("fork", child=child_path, step=at.step, sha256=at.header.sha256)


def _record_origin(
    parent: RunDirectory, child: RunDirectory, run_id: str, at: RunAtStep, changes: Changes
) -> None:
    child.append_ledger(
        "fork",
        run_id=run_id,
        parent=os.path.abspath(parent.folder.path),
        step=at.step,
        sha256=at.header.sha256,
        changes=changes,
        data=at.assembly.data_fingerprint(),
    )


def _publish(child: RunDirectory, run_id: str, at: RunAtStep, *, new_numerics: bool) -> None:
    # the parent's numerics decide the bits unless others were asked for
    numerics = json.dumps(at.assembly.numerics) if new_numerics else at.header.numerics
    image = codec.encode(
        at.assembly.state,
        run=child.name,
        run_id=run_id,
        config=at.assembly.config.text,
        numerics=numerics,
    )
    sha256 = Store(child.checkpoint_folder).publish(at.step, image)
    child.append_ledger(
        "checkpoint", step=at.step, file=names.file_name(at.step), sha256=sha256, pruned=[]
    )
