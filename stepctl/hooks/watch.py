"""What evaluations have come to: the best so far, how long nothing got better, and whether the target was reached."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from stepctl.arena import Array
from stepctl.config import EarlyStopping as EarlyStoppingConfig
from stepctl.config import TargetMetric as TargetMetricConfig
from stepctl.hooks.base import Hook, StopReason
from stepctl.state import Counters
from stepctl.tasks.base import Metrics, Mode


class Watch(Hook):
    """Looks at one metric of every evaluation on the grid. What it remembers is in every checkpoint.

    The arrays are there whether or not the config asks for this watch, so that it may be asked for at any resume.
    """

    in_use = True

    def __init__(self, metric: str, mode: Mode, min_delta: float = 0.0) -> None:
        self.metric, self.mode, self.min_delta = metric, mode, min_delta
        self._state: dict[str, Array] = {}
        self.forget()

    @property
    def goes_by(self) -> tuple[str, Mode, float]:
        """What decides what is remembered: where it is another, nothing that was remembered counts."""
        return self.metric, self.mode, self.min_delta

    def state(self) -> dict[str, Array]:
        return self._state

    @abstractmethod
    def forget(self) -> None:
        """Begin anew."""

    @abstractmethod
    def observe(self, step: int, metrics: Metrics) -> None:
        """Take in an evaluation."""

    def _better(self, value: float, than: float) -> bool:
        # a value that is not a number is never better, and any number is better than none
        if math.isnan(than):
            return not math.isnan(value)
        return value < than - self.min_delta if self.mode == "min" else value > than + self.min_delta

    def _set(self, **values: float) -> None:
        for name, value in values.items():
            if name not in self._state:
                self._state[name] = np.array(value, np.float64 if isinstance(value, float) else np.int64)
            self._state[name][...] = value


class Best(Watch):
    """The best value so far, and its step (-1: none yet)."""

    name = "best"

    def forget(self) -> None:
        self._set(value=math.nan, step=-1)

    def observe(self, step: int, metrics: Metrics) -> None:
        if self._better(metrics[self.metric], float(self._state["value"])):
            self._set(value=metrics[self.metric], step=step)


class EarlyStopping(Watch):
    """Stops when nothing got better for so many evaluations (Prechelt 1998); without a config it only counts."""

    name = "early_stopping"

    def __init__(self, metric: str, mode: Mode, config: EarlyStoppingConfig | None) -> None:
        self._config, self.in_use = config, config is not None
        super().__init__(metric, mode, config.min_delta if config else 0.0)

    def forget(self) -> None:
        self._set(value=math.nan, waited=0)

    def observe(self, step: int, metrics: Metrics) -> None:
        if self._better(metrics[self.metric], float(self._state["value"])):
            self._set(value=metrics[self.metric], waited=0)
        else:
            self._set(waited=int(self._state["waited"]) + 1)

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        waited = int(self._state["waited"])
        if self._config is None or waited < self._config.patience:
            return None
        value = float(self._state["value"])
        text = f"early stopping: {waited} evaluations without a better {self.metric} than {value:.6g}"
        remedy = "to go on: --set stop.early_stopping=null, or a larger patience"
        return StopReason(text, done=True, remedy=remedy)


class TargetMetric(Watch):
    """Stops once a metric is as good as asked for; without a config it only remembers the best."""

    name = "target_metric"

    def __init__(self, metric: str, mode: Mode, config: TargetMetricConfig | None) -> None:
        self._config, self.in_use = config, config is not None
        super().__init__(metric, mode)

    def forget(self) -> None:
        self._set(value=math.nan)

    def observe(self, step: int, metrics: Metrics) -> None:
        if self._better(metrics[self.metric], float(self._state["value"])):
            self._set(value=metrics[self.metric])

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        value = float(self._state["value"])
        if self._config is None or math.isnan(value) or self._better(self._config.value, value):
            return None
        text = f"target metric: {self.metric} {value:.6g} reached {self._config.value:.6g}"
        return StopReason(text, done=True, remedy="to go on: --set stop.target_metric=null")
