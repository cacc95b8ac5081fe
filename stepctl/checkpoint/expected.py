"""Which checkpoints a run must have, by its ledger, and which of them are missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from stepctl.checkpoint import names

Ledger = list[dict[str, Any]]
_ASIDE = re.compile(r"step-[0-9]{8,19}\.h5\.aside-[0-9]{1,9}")


def expected_checkpoints(ledger: Ledger) -> dict[int, str]:
    """Return step -> sha256 of the checkpoints that must be there: acknowledged, and neither pruned nor set aside."""
    expected: dict[int, str] = {}
    for row in ledger:
        if row["event"] == "checkpoint":
            expected[row["step"]] = row["sha256"]
        removed = [*_steps(row.get("pruned"))]
        if row["event"] == "prune":
            removed += _steps(row.get("steps"))
        for name in _listed(row.get("set_aside")):
            step = _step_of_aside(str(name))
            removed += [] if step is None else [step]
        for step in removed:
            expected.pop(step, None)
    return expected


def pending_set_aside(ledger: Ledger) -> dict[int, str]:
    """Return step -> new name of the checkpoints that the newest segment recorded to set aside, if it may not have.

    They are renamed right after the segment's first line is written: any later line tells that it is done.
    """
    if not ledger or ledger[-1]["event"] != "start":
        return {}
    pending = {}
    for name in _listed(ledger[-1].get("set_aside")):
        step = _step_of_aside(str(name))
        if step is not None and _ASIDE.fullmatch(str(name)):
            pending[step] = name
    return pending


def passed_over(ledger: Ledger) -> set[int]:
    """Return the steps of checkpoints that a later segment did not resume from, though they were the newest.

    They are damaged, or were not there. One that was made again since, or resumed from, is not among them.
    """
    acknowledged: set[int] = set()
    passed: set[int] = set()
    for row in ledger:
        if row["event"] == "checkpoint":
            acknowledged.add(row["step"])
        if row["event"] in ("checkpoint", "start"):
            passed.discard(row["step"])
        if row["event"] == "start":
            passed |= {step for step in acknowledged if step > row["step"]}
    return passed


def missing_checkpoints(read_ledger: Callable[[], Ledger], list_steps: Callable[[], list[int]]) -> list[int]:
    """Return the steps, rising, of the expected checkpoints that are not there. The run may be going on.

    The directory is listed after the ledger was read; what was pruned in between is in the ledger by then.
    """
    missing = expected_checkpoints(read_ledger()).keys() - set(list_steps())
    if not missing:
        return []
    return sorted(missing & expected_checkpoints(read_ledger()).keys())


def newer_missing(missing: list[int], step: int) -> str | None:
    """Return a message if checkpoints after `step`, which is used instead, are missing."""
    newer = [other for other in missing if other > step]
    if not newer:
        return None
    newest = names.file_name(newer[-1])
    others = f", and {len(newer) - 1} before it" if len(newer) > 1 else ""
    return f"{newest}: acknowledged in ledger.jsonl, but it is not there{others}; using {names.file_name(step)}"


def _step_of_aside(name: str) -> int | None:
    return names.step_of(name.partition(".aside-")[0])


def _steps(values: Any) -> list[int]:
    return [step for step in _listed(values) if isinstance(step, int)]


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else []
