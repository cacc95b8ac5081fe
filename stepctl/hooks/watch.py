"""Watches of a metric over the evaluations: the best value, early stopping, and a target value."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from stepctl.config.cadence import Cadence
from stepctl.config.model import EarlyStoppingConfig, TargetMetricConfig
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics, Mode
from stepctl.state.arena import Array
from stepctl.state.counters import Counters
from stepctl.stopping.base import StopReason, StopRule


class MetricWatch(Hook):
    """Follows one metric over the evaluations; its state is in every checkpoint.

    The state is kept whether or not the config uses the watch, so that any resume can enable it.
    """

    in_use = True  # by the config

    def __init__(self, metric: str, mode: Mode, min_delta: float = 0.0) -> None:
        self.metric = metric
        self.mode = mode
        self.min_delta = min_delta
        self._state: dict[str, Array] = {}
        self.reset()

    @property
    def criterion(self) -> tuple[str, Mode, float]:
        """The metric and how values are compared; the state of another criterion is meaningless."""
        return self.metric, self.mode, self.min_delta

    def state(self) -> dict[str, Array]:
        return self._state

    @abstractmethod
    def reset(self) -> None:
        """Return to the state before the first evaluation."""

    def update(self, step: int, metrics: Metrics) -> None:
        """Update the state with the metrics of an evaluation."""
        if self.metric:  # empty: nothing is watched
            self._update(step, metrics[self.metric])

    @abstractmethod
    def _update(self, step: int, value: float) -> None:
        """Take a value of the metric into account."""

    def _is_better(self, value: float, than: float) -> bool:
        if math.isnan(than):  # any number is better than NaN, and NaN is never better
            return not math.isnan(value)
        if self.mode == "min":
            return value < than - self.min_delta
        return value > than + self.min_delta

    def _set(self, **values: float) -> None:
        for name, value in values.items():
            if name not in self._state:
                dtype = np.float64 if isinstance(value, float) else np.int64
                self._state[name] = np.array(value, dtype)
            self._state[name][...] = value


class Best(MetricWatch):
    """The best value so far and its step (-1: none yet)."""

    name = "best"

    def reset(self) -> None:
        self._set(value=math.nan, step=-1)

    def _update(self, step: int, value: float) -> None:
        if self._is_better(value, float(self._state["value"])):
            self._set(value=value, step=step)


class MetricStopRule(StopRule, MetricWatch):
    """A watch that can stop the run. `evaluations` is the cadence at which its metric is evaluated."""

    def __init__(
        self, metric: str, mode: Mode, evaluations: Cadence, min_delta: float = 0.0
    ) -> None:
        super().__init__(metric, mode, min_delta)
        self._evaluations = evaluations

    def due_step(self, step: int) -> float:
        return self._evaluations.due_step(step)


class EarlyStopping(MetricStopRule):
    """Stops after `patience` evaluations without an improvement (Prechelt 1998).

    Without a config it only counts.
    """

    name = "early_stopping"

    def __init__(
        self, metric: str, mode: Mode, config: EarlyStoppingConfig | None, evaluations: Cadence
    ) -> None:
        self._config = config
        self.in_use = config is not None
        super().__init__(metric, mode, evaluations, config.min_delta if config else 0.0)

    def reset(self) -> None:
        self._set(value=math.nan, waited=0)

    def _update(self, step: int, value: float) -> None:
        if self._is_better(value, float(self._state["value"])):
            self._set(value=value, waited=0)
        else:
            self._set(waited=int(self._state["waited"]) + 1)

    def reason(self, counters: Counters) -> StopReason | None:
        waited = int(self._state["waited"])
        if self._config is None or waited < self._config.patience:
            return None
        best = float(self._state["value"])
        text = (
            f"early stopping: {waited} evaluations without a better {self.metric} than {best:.6g}"
        )
        remedy = "to continue: --set stop.early_stopping=null, or a larger patience"
        return StopReason(text, done=True, remedy=remedy)


class TargetMetric(MetricStopRule):
    """Stops once the best value reaches a target; without a config it only keeps the best value."""

    name = "target_metric"

    def __init__(
        self, metric: str, mode: Mode, config: TargetMetricConfig | None, evaluations: Cadence
    ) -> None:
        self._config = config
        self.in_use = config is not None
        super().__init__(metric, mode, evaluations)

    def reset(self) -> None:
        self._set(value=math.nan)

    def _update(self, step: int, value: float) -> None:
        if self._is_better(value, float(self._state["value"])):
            self._set(value=value)

    def reason(self, counters: Counters) -> StopReason | None:
        if self._config is None:
            return None
        best = float(self._state["value"])
        target = self._config.value
        if math.isnan(best) or self._is_better(target, best):
            return None
        text = f"target metric: {self.metric} {best:.6g} reached {target:.6g}"
        return StopReason(text, done=True, remedy="to continue: --set stop.target_metric=null")
