"""Which checkpoints to keep: a pure function of their steps and metrics."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepctl.config import Checkpoint


def to_prune(
    steps: Iterable[int],
    keep: Checkpoint,
    metrics: Mapping[int, Mapping[str, Any]],
    protected: Collection[int] = (),
) -> list[int]:
    """Return the steps to remove, rising; the newest never is one.

    Kept are the `keep_last` newest (None: all), every multiple of `keep_every`, the `keep_best.n` best of those
    whose metric is known (step -> metrics; of equals the earlier), and beside these the `protected` ones.
    """
    ordered = sorted(steps)
    if keep.keep_last is None:
        return []
    kept = set(ordered[-keep.keep_last :])
    if keep.keep_every is not None:
        kept |= {step for step in ordered if step % keep.keep_every == 0}
    if (best := keep.keep_best) is not None:
        sign = 1 if best.mode == "min" else -1
        values = {step: metrics[step].get(best.metric) for step in ordered if step in metrics}
        known = {step: value for step, value in values.items() if isinstance(value, int | float)}
        finite = [step for step, value in known.items() if abs(value) < math.inf]  # an int may be beyond any float
        kept |= set(sorted(finite, key=lambda step: (sign * known[step], step))[: best.n])
    return [step for step in ordered if step not in kept and step not in protected]
