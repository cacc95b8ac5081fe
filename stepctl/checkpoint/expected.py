"""The checkpoints that a run must have according to its ledger, and the ones that are missing."""

import re

from stepctl.checkpoint import names
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger

_SET_ASIDE_NAME = re.compile(r"step-[0-9]{8,19}\.h5\.aside-[0-9]{1,9}")


def expected_checkpoints(ledger: Ledger) -> dict[int, str]:
    """Return step -> sha256 of the acknowledged checkpoints, without pruned and set-aside ones."""
    expected: dict[int, str] = {}
    for event in ledger:
        removed: list[int] = []
        if event["event"] == "checkpoint":
            expected[event["step"]] = event["sha256"]
            if event.get("pruned"):
                removed = _steps(event["pruned"])
        elif event["event"] == "prune":
            removed = _steps(event["steps"])
        elif event["event"] == "start":
            removed = [step for step, _ in _set_aside(event.get("set_aside"))]
        for step in removed:
            expected.pop(step, None)
    return expected


def pending_set_aside(ledger: Ledger) -> dict[int, str]:
    """Return step -> new name of the checkpoints that may still have to be set aside.

    A segment renames them right after it recorded its start, so a later event means that they were
    renamed.
    """
    # the thread of a mirror writes its lines at any time
    events = (event for event in reversed(ledger.events) if event["event"] != "mirror")
    newest = next(events, None)
    if newest is None or newest["event"] != "start":
        return {}
    return {
        step: name
        for step, name in _set_aside(newest.get("set_aside"))
        if _SET_ASIDE_NAME.fullmatch(name)
    }


def skipped_checkpoints(ledger: Ledger) -> set[int]:
    """Return the steps of the checkpoints that a later segment skipped: damaged or missing ones.

    A step that was published again or resumed from since is not among them.
    """
    acknowledged: set[int] = set()
    skipped: set[int] = set()
    for event in ledger:
        if event["event"] == "checkpoint":
            acknowledged.add(event["step"])
            skipped.discard(event["step"])
        elif event["event"] == "start":
            skipped.discard(event["step"])
            skipped |= {step for step in acknowledged if step > event["step"]}
    return skipped


def missing_checkpoints(directory: RunDirectory, ledger: Ledger) -> list[int]:
    """Return the steps, in ascending order, of the expected checkpoints that are missing.

    The run may be training: the directory is listed after the ledger was read, and the ledger read
    again if a file is missing, because it records a pruned checkpoint before the file is removed.
    """
    found = names.steps(directory.checkpoint_folder.names())
    missing = expected_checkpoints(ledger).keys() - set(found)
    if not missing:
        return []
    return sorted(missing & expected_checkpoints(directory.read_ledger()).keys())


def describe_missing(missing: list[int], step: int) -> str | None:
    """Return a message if checkpoints after `step`, which is used instead, are missing."""
    newer = [other for other in missing if other > step]
    if not newer:
        return None
    newest = names.file_name(newer[-1])
    others = f", and {len(newer) - 1} before it" if len(newer) > 1 else ""
    return f"{newest}: acknowledged in ledger.jsonl, but missing{others}; using {names.file_name(step)}"


def _steps(values: object) -> list[int]:
    if not isinstance(values, list):
        return []
    return [step for step in values if isinstance(step, int)]


def _set_aside(values: object) -> list[tuple[int, str]]:
    """Return the step and the name of each checkpoint in a list of new names."""
    if not isinstance(values, list):
        return []
    found = []
    for value in values:
        name = str(value)
        step = names.step_of(name.partition(".aside-")[0])
        if step is not None:
            found.append((step, name))
    return found
