"""Schedules follow their published formulas, as functions of the step alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from stepctl.config import registry
from stepctl.optimizers import schedules
from stepctl.optimizers.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseTime,
    PiecewiseConstant,
    Polynomial,
    Schedule,
)

# Each formula takes (step, the step at which the warm-up ends).
Textbook = Callable[[int, int], float]


def between(step: int, start: int, end: int) -> float:
    """Return the share of start..end that lies before `step`."""
    return 1.0 if step >= end else (step - start) / (end - start)


def stairs(step: int) -> float:
    value = 0.0
    for boundary, rise in [(20, 0.5), (21, -0.4), (60, -0.05)]:
        value += rise if step >= boundary else 0
    return 0.1 + value


CASES: dict[str, tuple[Schedule, Textbook]] = {
    "constant": (Constant(value=0.3), lambda step, start: 0.3),
    "exponential": (
        Exponential(peak=0.2, decay_rate=0.9, decay_steps=7),
        lambda step, start: math.exp(math.log(0.2) + math.log(0.9) * (step - start) / 7),
    ),
    "exponential, staircase": (
        Exponential(peak=0.2, decay_rate=0.9, decay_steps=7, staircase=True),
        lambda step, start: 0.2 * math.prod([0.9] * min((step - start) // 7, 10_000)),
    ),
    "inverse_time": (
        InverseTime(peak=0.2, decay_rate=0.5, decay_steps=7),
        lambda step, start: 0.2 * 14 / (14 + step - start),
    ),
    "inverse_time, staircase": (
        InverseTime(peak=0.2, decay_rate=0.5, decay_steps=7, staircase=True),
        lambda step, start: 0.2 * 2 / (2 + (step - start - (step - start) % 7) / 7),
    ),
    "linear": (
        Polynomial(peak=0.2, end=0.05, decay_steps=60),
        lambda step, start: 0.2 + (0.05 - 0.2) * between(step, start, 60),
    ),
    "polynomial": (
        Polynomial(peak=0.2, end=0.05, decay_steps=60, power=2.0),
        lambda step, start: (
            0.05 + 0.15 * (1 - 2 * between(step, start, 60) + between(step, start, 60) ** 2)
        ),
    ),
    "piecewise_constant": (
        PiecewiseConstant(boundaries=[20, 21, 60], values=[0.1, 0.6, 0.2, 0.15]),
        lambda step, start: stairs(step),
    ),
    "cosine": (
        Cosine(peak=0.2, end=0.05, decay_steps=60),
        lambda step, start: 0.05 + 0.15 * math.cos(math.pi / 2 * between(step, start, 60)) ** 2,
    ),
    "rising cosine": (
        Cosine(peak=0.0, end=0.3, decay_steps=60),
        lambda step, start: 0.3 * math.sin(math.pi / 2 * between(step, start, 60)) ** 2,
    ),
}
WARMUPS = [0, 1, 13]
STEPS = [*range(101), 1_000, 10**6, 10**9, 10**15]


def with_warmup(name: str, steps: int) -> Schedule:
    return dataclasses.replace(CASES[name][0], warmup_steps=steps)


def test_the_table_holds_every_schedule() -> None:
    known = {registry.resolve("schedule", name) for name in schedules.NAMES}
    assert {type(schedule) for schedule, _ in CASES.values()} == known


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_textbooks(name: str, warmup: int) -> None:
    schedule, textbook = with_warmup(name, warmup), CASES[name][1]
    for step in STEPS:
        expected = (
            textbook(warmup, warmup) / warmup * (step + 1)
            if step < warmup
            else textbook(step, warmup)
        )
        assert schedule(step) == pytest.approx(expected, rel=1e-12, abs=1e-16), step


@pytest.mark.parametrize("name", CASES)
def test_a_rate_does_not_depend_on_earlier_calls(name: str) -> None:
    schedule = with_warmup(name, 13)
    forwards = [schedule(step) for step in STEPS]
    assert [schedule(step) for step in reversed(STEPS)] == forwards[::-1]


@pytest.mark.parametrize("name", CASES)
def test_the_last_step_of_a_warmup_has_the_full_rate(name: str) -> None:
    schedule = with_warmup(name, 13)
    assert schedule(12) == pytest.approx(schedule(13), rel=1e-15)
    assert schedule(0) == pytest.approx(schedule(13) / 13, rel=1e-15)


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("name", ["linear", "polynomial", "cosine", "rising cosine"])
def test_a_decay_ends_exactly_at_its_end_and_stays(name: str, warmup: int) -> None:
    schedule = with_warmup(name, warmup)
    end = schedule.end  # type: ignore[attr-defined]
    assert schedule(59) != end
    assert [schedule(step) for step in (60, 61, 10**9)] == [end] * 3


def test_a_decay_starts_exactly_at_its_peak() -> None:
    for name in ("exponential", "inverse_time", "cosine"):
        assert with_warmup(name, 13)(13) == with_warmup(name, 0)(0) == 0.2


def test_a_piecewise_value_holds_from_its_boundary_on() -> None:
    schedule = CASES["piecewise_constant"][0]
    assert [schedule(step) for step in (0, 19, 20, 21, 59, 60, 10**9)] == [
        0.1,
        0.1,
        0.6,
        0.2,
        0.2,
        0.15,
        0.15,
    ]


def test_a_staircase_falls_at_whole_periods_only() -> None:
    schedule = CASES["exponential, staircase"][0]
    assert [step for step in range(1, 30) if schedule(step) != schedule(step - 1)] == [
        7,
        14,
        21,
        28,
    ]


@pytest.mark.parametrize(
    ("boundaries", "values", "message"),
    [
        ([10], [0.1], "1 boundaries need 2 values"),
        ([10, 10], [0.1, 0.2, 0.3], "boundaries must be in ascending order"),
        ([20, 10], [0.1, 0.2, 0.3], "boundaries must be in ascending order"),
    ],
)
def test_piecewise_values_that_do_not_fit_are_refused(
    boundaries: list[int], values: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PiecewiseConstant(boundaries=boundaries, values=values)


@pytest.mark.parametrize(
    "schedule", [Cosine(peak=0.1), Polynomial(peak=0.1)], ids=["cosine", "polynomial"]
)
def test_a_decay_without_a_horizon_gives_no_rate(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="decay_steps is not set"):
        schedule(0)


@pytest.mark.parametrize("schedule", [Cosine, Polynomial])
def test_a_warm_up_that_leaves_no_decay_is_refused(
    schedule: type[Cosine] | type[Polynomial],
) -> None:
    with pytest.raises(ValueError, match="decay_steps 10 must be greater than warmup_steps 10"):
        schedule(peak=1.0, warmup_steps=10, decay_steps=10)


# --- landmarks

LANDMARKS: list[tuple[Schedule, list[int]]] = [
    (Constant(value=0.3), []),
    (Constant(value=0.3, warmup_steps=5), [5]),
    (Cosine(peak=0.3, decay_steps=60, warmup_steps=5), [5, 60]),
    (Cosine(peak=0.3), []),
    (Polynomial(peak=0.3, decay_steps=60), [60]),
    (Exponential(peak=0.3, decay_rate=0.9, decay_steps=7, warmup_steps=2), [2]),
    (Exponential(peak=0.3, decay_rate=0.9, decay_steps=7, warmup_steps=2, staircase=True), [2, 9]),
    (InverseTime(peak=0.3, decay_rate=0.9, decay_steps=7, staircase=True), [7]),
    (PiecewiseConstant(boundaries=[3, 8], values=[1.0, 2.0, 3.0], warmup_steps=5), [5, 8]),
]


@pytest.mark.parametrize(("schedule", "expected"), LANDMARKS, ids=lambda value: str(value)[:60])
def test_landmarks_are_the_steps_where_the_rate_turns(
    schedule: Schedule, expected: list[int]
) -> None:
    assert schedule.landmarks() == expected
