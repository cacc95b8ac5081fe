"""Learning-rate schedules: pure functions of the global step or of another counter.

Every schedule can start with a linear warm-up (Goyal et al. 2017, section 2.2). For N <
warmup_steps the rate is (N + 1) / warmup_steps times the rate at step warmup_steps, which is first
reached at N = warmup_steps - 1.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from stepctl.config.registry import Component, NonNegative, NonNegativeInt, Positive, PositiveStep

NAMES = {
    "constant": "stepctl.optimizers.schedules:Constant",
    "exponential": "stepctl.optimizers.schedules:Exponential",
    "inverse_time": "stepctl.optimizers.schedules:InverseTime",
    "polynomial": "stepctl.optimizers.schedules:Polynomial",
    "piecewise_constant": "stepctl.optimizers.schedules:PiecewiseConstant",
    "cosine": "stepctl.optimizers.schedules:Cosine",
}


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The learning rate of the update N -> N + 1, where N is the value of `counter`.

    Args:
        warmup_steps: Number of steps of a linear warm-up, whose last step uses the full rate.
        counter: The counter that the schedule follows: global_step, samples_seen, or a model of the
            task.
    """

    warmup_steps: NonNegativeInt = 0
    counter: str = "global_step"

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.after_warmup(self.warmup_steps) * (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """Return the rate at a step >= `warmup_steps`."""

    def landmarks(self) -> list[int]:
        """Return the end of the warm-up and the breakpoints after it, in order."""
        landmarks = [step for step in self.breakpoints() if step > self.warmup_steps]
        if self.warmup_steps:
            landmarks.insert(0, self.warmup_steps)
        return landmarks

    def breakpoints(self) -> list[int]:
        """Return the steps at which the formula changes after the warm-up, in order."""
        return []


LearningRate = Annotated[Schedule, Component("schedule", number="constant")]


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same rate at every step.

    Args:
        value: The rate.
    """

    value: NonNegative

    def after_warmup(self, step: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class _Decay(Schedule):
    """A decay from `peak` that never ends, with a period of `decay_steps`.

    Args:
        peak: Rate at the end of the warm-up.
        staircase: Change the rate only every decay_steps steps.
    """

    peak: NonNegative
    decay_rate: Positive
    decay_steps: PositiveStep
    staircase: bool = False

    def periods(self, step: int) -> float:
        """Return the periods since the end of the warm-up; only whole ones if `staircase`."""
        elapsed = step - self.warmup_steps
        if self.staircase:
            return elapsed // self.decay_steps
        return elapsed / self.decay_steps

    def breakpoints(self) -> list[int]:
        if self.staircase:
            return [self.warmup_steps + self.decay_steps]
        return []


@dataclass(frozen=True, kw_only=True)
class Exponential(_Decay):
    """peak * decay_rate ** (t / decay_steps), with t the steps since the end of the warm-up.

    With `staircase`, t / decay_steps is rounded down.

    Args:
        decay_rate: Factor by which the rate falls in decay_steps steps.
        decay_steps: Number of steps in which the rate falls by decay_rate.
    """

    decay_rate: Annotated[float, Field(gt=0, le=1)]

    def after_warmup(self, step: int) -> float:
        return float(self.peak * self.decay_rate ** self.periods(step))


@dataclass(frozen=True, kw_only=True)
class InverseTime(_Decay):
    """peak / (1 + decay_rate * t / decay_steps), with t the steps since the end of the warm-up.

    With `staircase`, t / decay_steps is rounded down.

    Args:
        decay_rate: The rate after decay_steps steps is peak / (1 + decay_rate).
        decay_steps: Number of steps that a unit of time has.
    """

    def after_warmup(self, step: int) -> float:
        return self.peak / (1 + self.decay_rate * self.periods(step))


@dataclass(frozen=True, kw_only=True)
class _DecayToEnd(Schedule):
    """A decay from `peak` at the end of the warm-up to `end` at step `decay_steps`.

    The rate is `end` from there on. A run without `decay_steps` sets it to its first target.

    Args:
        peak: Rate at the end of the warm-up.
        end: Rate at step decay_steps and after it.
        decay_steps: The step at which the decay ends; by default the run's first target.
    """

    peak: NonNegative
    end: NonNegative = 0.0
    decay_steps: PositiveStep | None = None

    def __post_init__(self) -> None:
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps {self.decay_steps} must be greater than warmup_steps "
                f"{self.warmup_steps}"
            )

    def progress(self, step: int) -> float:
        """Return the completed fraction of the decay at a step, from 0 to 1."""
        if self.decay_steps is None:
            raise ValueError("decay_steps is not set")
        return min(1.0, (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))

    def breakpoints(self) -> list[int]:
        return [] if self.decay_steps is None else [self.decay_steps]


@dataclass(frozen=True, kw_only=True)
class Polynomial(_DecayToEnd):
    """(peak - end) * (1 - progress) ** power + end, where progress goes from 0 to 1.

    The decay starts at the end of the warm-up and ends at step `decay_steps`. A run without
    `decay_steps` sets it to its first target.

    Args:
        power: Exponent of the decay; 1 is linear.
    """

    power: Positive = 1.0

    def after_warmup(self, step: int) -> float:
        remaining = 1 - self.progress(step)
        return float((self.peak - self.end) * remaining**self.power + self.end)


@dataclass(frozen=True, kw_only=True)
class Cosine(_DecayToEnd):
    """end + (peak - end) * (1 + cos(pi * progress)) / 2, where progress goes from 0 to 1.

    Loshchilov and Hutter 2017, equation 5, without restarts. The decay starts at the end of the
    warm-up and ends at step `decay_steps`. A run without `decay_steps` sets it to its first target.
    """

    def after_warmup(self, step: int) -> float:
        progress = self.progress(step)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class PiecewiseConstant(Schedule):
    """values[i], where i is the number of boundaries <= step.

    Args:
        boundaries: The steps at which the rate changes, in ascending order.
        values: The rates: one before the first boundary, and one from each boundary on.
    """

    boundaries: list[PositiveStep]
    values: list[NonNegative]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} values"
            )
        if any(a >= b for a, b in pairwise(self.boundaries)):
            raise ValueError("boundaries must be in ascending order")

    def after_warmup(self, step: int) -> float:
        return self.values[bisect.bisect_right(self.boundaries, step)]

    def breakpoints(self) -> list[int]:
        return self.boundaries
