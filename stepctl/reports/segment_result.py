"""The result of `train` and `resume` as one object, for programs."""

from __future__ import annotations

from typing import TypedDict

from stepctl.checkpoint import names
from stepctl.rundir.directory import RunDirectory
from stepctl.writers.base import MetricsRow


class SegmentResult(TypedDict):
    """How a segment ended.

    `local_step` is the number of steps that it made, `done` whether the run is at its target or
    ended by a stop rule, `metrics` the newest row of each kind ("train", "eval"), and `checkpoint`
    the path of the newest checkpoint, None if there is none.
    """

    run: str
    step: int
    local_step: int
    target: int | None
    done: bool
    reason: str
    metrics: dict[str, MetricsRow]
    checkpoint: str | None


def segment_result(
    directory: RunDirectory, *, reason: str, done: bool, local_step: int
) -> SegmentResult:
    """Return the result of the segment that has just ended."""
    ledger = directory.read_ledger()
    newest = max(ledger.acknowledged.values(), default=None)
    checkpoint = None
    if newest is not None:
        checkpoint = str(directory.checkpoints / names.file_name(newest))
    return SegmentResult(
        run=str(directory.path),
        step=newest or 0,
        local_step=local_step,
        target=ledger.target,
        done=done,
        reason=reason,
        metrics={row["kind"]: row for row in directory.read_metrics()},
        checkpoint=checkpoint,
    )
