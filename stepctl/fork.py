"""A new run from a step of an old one; nothing is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepctl import config as configs
from stepctl import rundir
from stepctl.assembly import Assembly, assemble, check_size, settle_numerics
from stepctl.checkpoint import codec, names
from stepctl.checkpoint.expected import pending_set_aside
from stepctl.checkpoint.store import Store
from stepctl.config import Config
from stepctl.errors import CheckpointError, ConfigError
from stepctl.hooks.base import Hook
from stepctl.run import check_same_run, founded, horizon_notes, report_missing, watched_with
from stepctl.rundir import RunDirectory
from stepctl.segment import Say, silent


@dataclass(frozen=True)
class ForkOptions:
    """What a fork may ask for: its step (None: the newest good one), and what its config has otherwise."""

    at: int | None = None
    assignments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forked:
    """Where the new run stands, and the step that a plain resume of it goes on to."""

    step: int
    target: int
    changes: list[dict[str, Any]]
    stopped: str = ""  # why a plain resume would do nothing, although the target is ahead; empty if it has work


def fork(
    parent: RunDirectory, child: RunDirectory, options: ForkOptions, say: Say = silent, hooks: Sequence[Hook] = ()
) -> Forked:
    """Publish a checkpoint of `parent`, under its newest config and what the options change, as a run of its own.

    Both ledgers record it. ConfigError if the config is wrong, or `child` holds something; CheckpointError if the
    checkpoint is not good, or its state or counters do not fit the config; RunInUseError if `parent` is in use.
    """
    child.refuse_run()
    child.refuse_strangers()
    with parent.lock(say):
        store = Store(parent.checkpoint_folder, parent.records)
        store.set_aside_all(pending_set_aside(parent.read_ledger()))
        base, asked = _configs(parent, options)
        with store.newest(say) if options.at is None else _open(store, options.at) as reader:
            assembly = _assemble(base, asked, reader.header.global_step, hooks)
            config = assembly.config
            codec.restore(reader, assembly.state)
            assembly.task.check_counters(assembly.state.counters, config.initial_step)
            header = reader.header
            for line in check_same_run(reader.name, header.config, config.plain(), set(Config.model_fields)).values():
                say(line)
        if options.at is None:
            report_missing(parent, store, header.global_step, say)
        changes = configs.changes(base, config)
        for watch in assembly.forget(watched_with(header, base)):
            say(f"note: {watch} goes by something else in the fork, and begins anew")
        _check_data(assembly, parent, changes, say)
        assembly.trial()
        settled = config.numerics != base.numerics
        texts = {
            "run": child.name,
            "config": config.text,
            # the bits are those of the parent's numerics until other ones are asked for
            "numerics": json.dumps(assembly.numerics) if settled else header.numerics,
        }
        target = config.target(header.global_step)
        for note in horizon_notes(assembly, target, locked=False):
            say(f"note: {note}")
        with founded(child, config, say) as run_id:
            _record(parent, child, run_id, header, changes, assembly.data_fingerprint)
            _publish(child, codec.encode(assembly.state, run_id=run_id, **texts), header.global_step)
    reasons = (rule.reason(assembly.state.counters) for rule in assembly.stop_rules())
    stopped = next((f"{reason.text}; {reason.remedy}" for reason in reasons if reason), "")
    return Forked(header.global_step, target, changes, stopped)


def _configs(parent: RunDirectory, options: ForkOptions) -> tuple[Config, Config]:
    document = parent.newest_config()
    base = configs.parse(document)
    document.set_all(options.assignments)
    return base, configs.parse(document)


def _open(store: Store, step: int) -> codec.Reader:
    try:
        return store.open(step)
    except CheckpointError as error:
        others = [str(other) for other in store.steps() if other != step]
        if error.code == "none":
            raise
        raise CheckpointError(error.code, f"{error}; other steps there are: {', '.join(others) or 'none'}") from error


def _assemble(base: Config, config: Config, step: int, hooks: Sequence[Hook]) -> Assembly:
    target, open_keys = config.target(step), list(config.horizon_keys())
    if open_keys and target <= step:
        raise ConfigError(f"{open_keys[0]}: is missing, and the target {target} is not past step {step}; give one")
    assembly = assemble(config, hooks, target=target)
    if config.numerics != base.numerics:
        settle_numerics(assembly)
    check_size(assembly.config)
    return assembly


def _check_data(assembly: Assembly, parent: RunDirectory, changes: list[dict[str, Any]], say: Say) -> None:
    asked = any(change["key"].startswith("data.") for change in changes)
    recorded = rundir.newest_data(parent.read_ledger())
    same = recorded is None or assembly.has_data(recorded)
    if asked or not same:
        assembly.check_data(say)
    if not asked and not same:
        say(f"warning: {assembly.origins}: not the data that {parent.path} was trained on; the fork goes on with these")


def _record(
    parent: RunDirectory,
    child: RunDirectory,
    run_id: str,
    header: codec.Header,
    changes: list[dict[str, Any]],
    data: str,
) -> None:
    # both before the child has a checkpoint: no run may stand whose parent's step can be pruned
    said: dict[str, Any] = {"step": header.global_step, "sha256": header.sha256}
    parent_path, child_path = (os.path.abspath(run.folder.path) for run in (parent, child))
    child.append_ledger("fork", run_id=run_id, parent=parent_path, **said, changes=changes, data=data)
    parent.append_ledger("fork", child=child_path, **said)


def _publish(child: RunDirectory, image: codec.Image, step: int) -> None:
    digest = Store(child.checkpoint_folder).publish(step, image)
    child.append_ledger("checkpoint", step=step, file=names.file_name(step), sha256=digest, pruned=[])
