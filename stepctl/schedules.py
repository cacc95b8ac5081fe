"""Learning-rate schedules: pure functions of the global step, or of the counter that they name.

Every schedule can open with a linear warm-up (Goyal et al. 2017, section 2.2): for N < warmup_steps the rate is
(N + 1) / warmup_steps times the schedule's value at the end of the warm-up.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from stepctl.registry import Component, NonNegative, NonNegativeInt, Positive, PositiveStep

NAMES = {
    "constant": "stepctl.schedules:Constant",
    "exponential": "stepctl.schedules:Exponential",
    "inverse_time": "stepctl.schedules:InverseTime",
    "polynomial": "stepctl.schedules:Polynomial",
    "piecewise_constant": "stepctl.schedules:PiecewiseConstant",
    "cosine": "stepctl.schedules:Cosine",
}


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A pure function: N -> the learning rate of the update N -> N + 1, N the global step or another counter."""

    warmup_steps: NonNegativeInt = 0
    counter: str = "global_step"

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.after_warmup(self.warmup_steps) * (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """Return the rate at `step`, which is not below `warmup_steps`."""

    def landmarks(self) -> list[int]:
        """Return the steps, rising, from which the rate goes another way: the warm-up's end, then the `turns`."""
        warmup = [self.warmup_steps] if self.warmup_steps else []
        return warmup + [step for step in self.turns() if step > self.warmup_steps]

    def turns(self) -> list[int]:
        """Return the schedule's own landmarks, rising: none unless it says so."""
        return []


LearningRate = Annotated[Schedule, Component("schedules", number="constant")]


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same rate at every step."""

    value: NonNegative

    def after_warmup(self, step: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """peak * decay_rate ** (t / decay_steps), t counted from the end of the warm-up; whole powers if `staircase`."""

    peak: NonNegative
    decay_rate: Annotated[float, Field(gt=0, le=1)]
    decay_steps: PositiveStep
    staircase: bool = False

    def after_warmup(self, step: int) -> float:
        periods = _periods(step - self.warmup_steps, self.decay_steps, self.staircase)
        return float(self.peak * self.decay_rate**periods)

    def turns(self) -> list[int]:
        return _first_stair(self.warmup_steps, self.decay_steps, self.staircase)


@dataclass(frozen=True, kw_only=True)
class InverseTime(Schedule):
    """peak / (1 + decay_rate * t / decay_steps), t counted from the end of the warm-up."""

    peak: NonNegative
    decay_rate: Positive
    decay_steps: PositiveStep
    staircase: bool = False

    def after_warmup(self, step: int) -> float:
        periods = _periods(step - self.warmup_steps, self.decay_steps, self.staircase)
        return self.peak / (1 + self.decay_rate * periods)

    def turns(self) -> list[int]:
        return _first_stair(self.warmup_steps, self.decay_steps, self.staircase)


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """From `peak` at the end of the warm-up to `end` at step `decay_steps`, and `end` from there on.

    (peak - end) * (1 - progress) ** power + end. Without `decay_steps`, a run writes its first target there.
    """

    peak: NonNegative
    end: NonNegative = 0.0
    decay_steps: PositiveStep | None = None
    power: Positive = 1.0

    def __post_init__(self) -> None:
        _check_horizon(self.warmup_steps, self.decay_steps)

    def after_warmup(self, step: int) -> float:
        left = 1 - _progress(step, self.warmup_steps, self.decay_steps)
        return float((self.peak - self.end) * left**self.power + self.end)

    def turns(self) -> list[int]:
        return _horizon(self.decay_steps)


@dataclass(frozen=True, kw_only=True)
class PiecewiseConstant(Schedule):
    """values[i] where i boundaries are at or below the step: a new value holds from its boundary on."""

    boundaries: list[PositiveStep]
    values: list[NonNegative]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} values")
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError("boundaries must rise")

    def after_warmup(self, step: int) -> float:
        return self.values[bisect.bisect_right(self.boundaries, step)]

    def turns(self) -> list[int]:
        return self.boundaries


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """From `peak` at the end of the warm-up to `end` at step `decay_steps`, along half a cosine.

    end + (peak - end) * (1 + cos(pi * progress)) / 2 (Loshchilov and Hutter 2017, equation 5, without restarts).
    Without `decay_steps`, a run writes its first target there.
    """

    peak: NonNegative
    end: NonNegative = 0.0
    decay_steps: PositiveStep | None = None

    def __post_init__(self) -> None:
        _check_horizon(self.warmup_steps, self.decay_steps)

    def after_warmup(self, step: int) -> float:
        progress = _progress(step, self.warmup_steps, self.decay_steps)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * progress)) / 2

    def turns(self) -> list[int]:
        return _horizon(self.decay_steps)


def _periods(elapsed: int, decay_steps: int, staircase: bool) -> float:
    return elapsed // decay_steps if staircase else elapsed / decay_steps


def _first_stair(warmup_steps: int, decay_steps: int, staircase: bool) -> list[int]:
    return [warmup_steps + decay_steps] if staircase else []


def _horizon(decay_steps: int | None) -> list[int]:
    return [] if decay_steps is None else [decay_steps]


def _check_horizon(warmup_steps: int, decay_steps: int | None) -> None:
    if decay_steps is not None and decay_steps <= warmup_steps:
        raise ValueError(f"warmup_steps {warmup_steps} leaves nothing of decay_steps {decay_steps}; change one of them")


def _progress(step: int, warmup_steps: int, decay_steps: int | None) -> float:
    if decay_steps is None:
        raise ValueError("decay_steps is not set")
    return min(1.0, (step - warmup_steps) / (decay_steps - warmup_steps))
