"""Which checkpoints to keep: a pure function of their steps and metrics."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepctl.config.model import CheckpointConfig, KeepBestConfig

MetricsByStep = Mapping[int, Mapping[str, Any]]  # step -> metrics of its evaluation


def to_prune(
    steps: Iterable[int],
    keep: CheckpointConfig,
    metrics: MetricsByStep,
    protected: Collection[int] = (),
) -> list[int]:
    """Return the steps to remove, in ascending order; never the newest.

    Kept are the `keep_last` newest (None: all), every multiple of `keep_every`, the `keep_best.n`
    best by their metric, and the `protected` ones, which do not count as any of these.
    """
    ordered = sorted(steps)
    if keep.keep_last is None:
        return []
    kept = _newest_and_best(ordered, keep.keep_last, keep.keep_best, metrics)
    if keep.keep_every is not None:
        kept.update(step for step in ordered if step % keep.keep_every == 0)
    return [step for step in ordered if step not in kept and step not in protected]


class Retention:
    """The steps to remove after each save, in a time that does not grow with the number of files.

    It remembers the steps that a later save may turn into steps to remove, or that count among the
    newest or the best: all others are kept for good.
    """

    def __init__(
        self,
        steps: Iterable[int],
        keep: CheckpointConfig,
        metrics: MetricsByStep,
        protected: Collection[int],
    ) -> None:
        """`steps` have a good file. `metrics` may grow, and is read at each call of `add`."""
        self._steps = set(steps)
        self._keep = keep
        self._metrics = metrics
        self._protected = protected

    def add(self, step: int) -> list[int]:
        """Return the steps to remove after a save, as `to_prune` does."""
        keep = self._keep
        if keep.keep_last is None:
            return []
        self._steps.add(step)
        pruned = to_prune(self._steps, keep, self._metrics, self._protected)
        ordered = sorted(self._steps)
        self._steps = _newest_and_best(ordered, keep.keep_last, keep.keep_best, self._metrics)
        return pruned


def _newest_and_best(
    ordered: list[int], keep_last: int, keep_best: KeepBestConfig | None, metrics: MetricsByStep
) -> set[int]:
    kept = set(ordered[-keep_last:])
    if keep_best is not None:
        kept.update(best_steps(ordered, keep_best, metrics))
    return kept


def best_steps(steps: list[int], keep_best: KeepBestConfig, metrics: MetricsByStep) -> list[int]:
    """Return the best steps by a metric, the best first; of equals the earlier is better.

    Steps whose value is not finite are left out.
    """
    sign = 1 if keep_best.mode == "min" else -1
    ranked: list[tuple[float, int]] = []
    for step in steps:
        value = metrics.get(step, {}).get(keep_best.metric)
        # Not math.isfinite: an int may be larger than any float.
        if isinstance(value, int | float) and abs(value) < math.inf:
            ranked.append((sign * value, step))
    return [step for _, step in sorted(ranked)[: keep_best.n]]
