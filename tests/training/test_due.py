"""Stop rules and hooks are called when they are due, and not in the steps between."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from stepctl.config.cadence import Cadence
from stepctl.hooks.base import Hook, PeriodicHook
from stepctl.programs.base import Metrics
from stepctl.state.counters import GLOBAL_STEP, SAMPLES_SEEN, Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason, StopRule
from stepctl.stopping.rules import StopAtStep, StopFile, TimeLimit
from stepctl.training.build import assemble
from stepctl.training.trainer import Trainer
from tests.support.runs import make_config
from tests.support.stops import some_of


class Periodic(PeriodicHook):
    """Records the steps at which it is called."""

    name = "periodic"

    def __init__(self, cadence: Cadence) -> None:
        super().__init__(cadence)
        self.steps: list[int] = []

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.steps.append(state.counters.global_step)


class EachStep(Hook):
    """Records the steps at which it is called: all of them."""

    name = "each_step"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.steps.append(state.counters.global_step)


class Timed(EachStep):
    """Is due at a time."""

    name = "timed"

    def __init__(self, time: float) -> None:
        super().__init__()
        self._time = time

    def due_step(self, step: int) -> float:
        return math.inf

    def due_time(self) -> float:
        return math.inf if self.steps else self._time


class Checks(StopRule):
    """Records the steps before which it is checked, and is due at none."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def reason(self, counters: Counters) -> StopReason | None:
        self.steps.append(counters.global_step)
        return None


class Clock:
    """A clock that advances whenever it is read."""

    def __init__(self, by: float = 1) -> None:
        self.now = 0.0
        self._by = by

    def __call__(self) -> float:
        self.now += self._by
        return self.now


def make_trainer(
    *hooks: Hook,
    rules: tuple[StopRule, ...] = (),
    last_step: int = 12,
    signalled: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = lambda: 0.0,
) -> Trainer:
    assembly = assemble(make_config())
    return Trainer(
        assembly.task,
        assembly.training,
        assembly.state,
        stop=[StopAtStep(last_step), *rules],
        hooks=hooks,
        signalled=signalled,
        clock=clock,
    )


@pytest.mark.training
def test_nothing_is_called_between_two_steps_of_a_cadence() -> None:
    rule = Checks()
    hook = Periodic(Cadence(5))
    make_trainer(hook, rules=(rule,)).run()
    assert hook.steps == [5, 10]
    assert rule.steps == [0, 1, 5, 10], "the first, then after each call of the hooks"


@pytest.mark.training
def test_a_hook_of_the_user_is_called_after_every_step() -> None:
    rule = Checks()
    hook = EachStep()
    make_trainer(Periodic(Cadence(5)), hook, rules=(rule,)).run()
    assert hook.steps == [*range(1, 13)]
    assert rule.steps == [*range(12)]


@pytest.mark.training
def test_a_signal_is_seen_after_the_step_in_flight() -> None:
    rule = Checks()
    came = iter([False] * 6 + [True] + [False] * 100)  # after each step that is not due
    make_trainer(rules=(rule,), signalled=lambda: next(came)).run()
    assert rule.steps == [0, 7]


@pytest.mark.training
def test_a_hook_that_is_due_at_a_time_is_called_at_the_first_step_after_it() -> None:
    hook = Timed(6.5)
    make_trainer(hook, clock=Clock()).run()
    assert hook.steps == [7, 12], "and with others: the last step is due"


@pytest.mark.training
def test_a_stop_file_ends_a_run_in_which_nothing_else_is_due(tmp_path: Path) -> None:
    clock = Clock(by=1 / 8)
    path = tmp_path / "STOP"

    def touch_late() -> bool:
        if clock.now > 20:
            path.touch()
        return False

    rule = StopFile(path, clock=lambda: clock.now)
    trainer = make_trainer(rules=(rule,), last_step=1000, clock=clock, signalled=touch_late)
    assert trainer.run().text == "file STOP"
    assert trainer.state.counters.global_step == 21 * 8, "at the next check, at 21 s"


@pytest.mark.training
def test_a_time_limit_ends_a_run_in_which_nothing_else_is_due() -> None:
    clock = Clock()
    rule = TimeLimit(30, 0, clock=lambda: clock.now)
    trainer = make_trainer(rules=(rule,), last_step=1000, clock=clock)
    assert trainer.run().text == "max_time 30 s"
    assert trainer.state.counters.global_step == 30


@pytest.mark.training
def test_look_up_makes_all_due_after_the_step_in_flight() -> None:
    trainer = make_trainer()
    trainer.start()
    trainer.train(4)
    assert not trainer.is_due
    trainer.look_up()
    trainer.step()
    assert trainer.is_due


@pytest.mark.parametrize("first_step", [None, 1, 4])
@pytest.mark.parametrize("start", [0, 3, 7])
@pytest.mark.parametrize("counter", [GLOBAL_STEP, SAMPLES_SEEN])
@pytest.mark.parametrize("every", some_of([1, 2, 3, 5, 7, 64], every=2))
def test_a_cadence_fires_at_the_same_steps_if_it_is_called_only_when_due(
    every: int, counter: str, start: int, first_step: int | None
) -> None:
    for offset in range(min(every, 8)):
        asked_always = Cadence(every, offset, counter, first_step=first_step)
        asked_when_due = Cadence(every, offset, counter, first_step=first_step)
        counters = Counters({GLOBAL_STEP: start, SAMPLES_SEEN: start * 3})
        due = asked_when_due.due_step(start)
        for step in range(start + 1, 80):
            counters.advance({GLOBAL_STEP: 1, SAMPLES_SEEN: 3})
            fires = asked_always.fires(counters)
            if step >= due:
                assert asked_when_due.fires(counters) == fires
                due = asked_when_due.due_step(step)
                assert due > step
            else:
                assert not fires, step


def test_a_cadence_without_every_is_never_due() -> None:
    assert Cadence(None).due_step(7) == math.inf
    assert Cadence(None, counter=SAMPLES_SEEN).due_step(7) == math.inf
