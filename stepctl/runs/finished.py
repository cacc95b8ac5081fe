"""Detecting a finished run without building its parts, and without importing anything of the user's."""

from __future__ import annotations

from stepctl.checkpoint.expected import pending_set_aside
from stepctl.checkpoint.store import Store
from stepctl.errors import StepctlError
from stepctl.rundir.mirror_status import is_mirrored
from stepctl.runs.messages import Say
from stepctl.runs.records import RunRecords
from stepctl.state.counters import Counters
from stepctl.stopping.base import first_reason
from stepctl.stopping.rules import StopAtStep
from stepctl.system import store_url


def describe_finished(records: RunRecords, say: Say) -> str | None:
    """Return why a resume without options has nothing to do; None if it may have something.

    It has if the last segment did not mirror the newest checkpoint. A task's run that stopped
    before its target is recognised only if one of the config's hooks stopped it: then no hook is
    imported.
    """
    plain = records.document.value
    target = records.ledger.target
    if not isinstance(plain, dict) or "script" in plain or target is None:
        return None
    if plain.get("mirror") is not None and not _is_mirrored(records, store_url.mirror_of(plain)):
        return None
    at_target = _describe_target_reached(records, target)
    if at_target is not None:
        return at_target
    if "program" not in plain:
        return _describe_stop_by_hook(records, target) if plain.get("hooks") else None
    return _describe_stopped_program(records, target, say)


def _is_mirrored(records: RunRecords, url: str | None) -> bool:
    """Tell whether the newest checkpoint is in this mirror; False for a wrong URL."""
    ledger = records.ledger
    newest = ledger.newest_checkpoint(max(ledger.acknowledged.values(), default=-1))
    if newest is None or url is None:
        return False  # the resume reports it
    return is_mirrored(records.directory.folder, url, newest["sha256"])


def _describe_target_reached(records: RunRecords, target: int) -> str | None:
    """Return the message if the newest checkpoint is good and its step is the target or later."""
    ledger = records.ledger
    newest = max(ledger.acknowledged.values(), default=-1)
    if newest < target or pending_set_aside(ledger):
        return None
    refused: list[str] = []
    store = Store(records.directory.checkpoint_folder, lambda: ledger)
    try:
        with store.newest(refused.append) as reader:
            header = reader.header
    except StepctlError:
        return None  # the resume reports it
    if refused or header.global_step != newest or header.sha256 not in ledger.acknowledged:
        return None
    reason = StopAtStep(target).reason(Counters(header.counters))
    assert reason is not None
    return reason.describe_nothing_to_do(newest, target)


def _describe_stopped_program(records: RunRecords, target: int, say: Say) -> str | None:
    """Return the message if a stop rule in the state of a program has stopped its run."""
    from pydantic import ValidationError

    from stepctl.config.model import ProgramConfig
    from stepctl.runs.at_step import RunFiles, open_at_step
    from stepctl.runs.compatibility import changed_keys
    from stepctl.training.build_program import assemble_stored

    messages: list[str] = []
    try:
        config = ProgramConfig.model_validate(records.document.value)
        assembly = assemble_stored(config)
        store = Store(records.directory.checkpoint_folder, lambda: records.ledger)
        run = RunFiles(records.directory, records.ledger, config, store)
        at = open_at_step(
            run,
            lambda step: assembly,
            step=None,
            say=messages.append,
            may_differ=changed_keys(records.ledger, []),
        )
    except (StepctlError, ValidationError):
        return None  # the resume reports it
    reason = first_reason(assembly.stop_rules(), assembly.state.counters)
    if reason is None or at.step not in records.ledger.acknowledged.values():
        return None
    for message in messages:
        say(message)
    return reason.describe_nothing_to_do(at.step, target)


def _describe_stop_by_hook(records: RunRecords, target: int) -> str | None:
    """Return the message if the newest checkpoint of a task has the stop that a hook requested."""
    from stepctl.checkpoint.codec import restore_hook
    from stepctl.hooks.stop_request import HookStop

    ledger = records.ledger
    refused: list[str] = []
    hook_stop = HookStop()
    store = Store(records.directory.checkpoint_folder, lambda: ledger)
    try:
        with store.newest(refused.append) as reader:
            header = reader.header
            restore_hook(reader, hook_stop)
    except StepctlError:
        return None  # the resume reports it
    reason = hook_stop.reason(Counters(header.counters))
    newest = max(ledger.acknowledged.values(), default=-1)
    if reason is None or refused or header.global_step != newest or pending_set_aside(ledger):
        return None
    return reason.describe_nothing_to_do(newest, target)
