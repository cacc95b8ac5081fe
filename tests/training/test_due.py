"""Stop rules and hooks are called when they are due, and not in the steps between."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from stepctl.checkpoint.background import Background
from stepctl.config.cadence import Cadence
from stepctl.config.model import WhenConfig
from stepctl.data.batches import Batch
from stepctl.errors import NonFiniteError, StepctlError
from stepctl.hooks.base import Hook, PeriodicHook, TimedHook
from stepctl.hooks.progress import OptionalProgress, Progress, ProgressDisplay
from stepctl.hooks.slow_threads import SlowThreads
from stepctl.hooks.stop_request import HookStop, StopRequest
from stepctl.programs.base import Metrics
from stepctl.state.counters import GLOBAL_STEP, SAMPLES_SEEN, Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason, StopRule
from stepctl.stopping.rules import StopAtStep, StopFile, TimeLimit
from stepctl.training.build import assemble
from stepctl.training.trainer import Lead, Trainer
from tests.support.runs import make_config, train
from tests.support.saves import make_save
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


class Timed(TimedHook):
    """Is due at the times of a list; records the steps at which it is called."""

    name = "timed"

    def __init__(self, *times: float) -> None:
        self.steps: list[int] = []
        self._times = iter(times)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.steps.append(state.counters.global_step)

    def due_time(self) -> float:
        return next(self._times, math.inf)


class Checks(StopRule):
    """Records the steps before which it is checked, and is due at none."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def reason(self, counters: Counters) -> StopReason | None:
        self.steps.append(counters.global_step)
        return None


class Clock:
    """A clock that a trainer's steps advance."""

    def __init__(self, seconds_per_step: float = 1) -> None:
        self.counters: Counters | None = None  # of the trainer
        self._seconds_per_step = seconds_per_step

    @property
    def now(self) -> float:
        step = 0 if self.counters is None else self.counters.global_step
        return step * self._seconds_per_step

    def __call__(self) -> float:
        return self.now


def make_trainer(
    *hooks: Hook,
    rules: tuple[StopRule, ...] = (),
    last_step: int = 12,
    lead: Lead | None = None,
    signalled: Callable[[], bool] = lambda: False,
    hook_stop: HookStop | None = None,
    clock: Clock | None = None,
) -> Trainer:
    assembly = assemble(make_config())
    clock = clock or Clock(0)
    clock.counters = assembly.state.counters
    return Trainer(
        assembly.task,
        assembly.training,
        assembly.state,
        stop=[StopAtStep(last_step), *rules],
        hooks=hooks,
        hook_stop=hook_stop,
        lead=lead,
        signalled=signalled,
        clock=clock,
    )


@pytest.mark.training
def test_nothing_is_called_between_two_steps_of_a_cadence() -> None:
    rule = Checks()
    hook = Periodic(Cadence(5))
    make_trainer(hook, rules=(rule,)).run()
    assert hook.steps == [5, 10]
    assert rule.steps == [0]


@pytest.mark.training
def test_of_several_hooks_each_is_called_when_it_is_due() -> None:
    hooks = [Periodic(Cadence(3, offset)) for offset in (2, 1, 0)]
    make_trainer(*hooks).run()
    assert [hook.steps for hook in hooks] == [[2, 5, 8, 11], [1, 4, 7, 10], [3, 6, 9, 12]]


@pytest.mark.training
def test_a_hook_of_the_user_is_called_after_every_step_and_no_other_with_it() -> None:
    rule = Checks()
    timed = Timed(6.5)
    hook = EachStep()
    make_trainer(timed, hook, rules=(rule,), clock=Clock()).run()
    assert hook.steps == [*range(1, 13)]
    assert timed.steps == [1, 7]
    assert rule.steps == [0]


class Fails(EachStep):
    """Fails at the first step."""

    name = "fails"

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        raise ValueError("failed")


class Essential(EachStep):
    """Has something without which no checkpoint is complete."""

    name = "essential"
    essential = True


@pytest.mark.training
def test_after_a_hook_failed_only_the_essential_ones_are_called() -> None:
    hooks = (EachStep(), Fails(), EachStep(), Essential())
    with pytest.raises(ValueError, match="failed"):
        make_trainer(*hooks).run()
    assert [hook.steps for hook in hooks] == [[1], [], [], [1]]


class CannotTell(EachStep):
    """Does not know when it is due next."""

    name = "cannot_tell"

    def due_step(self, step: int) -> float:
        raise ValueError("no idea")


@pytest.mark.training
def test_a_hook_that_cannot_tell_when_it_is_due_keeps_no_other_from_being_called() -> None:
    hooks = (CannotTell(), Essential())
    trainer = make_trainer(*hooks)
    with pytest.raises(ValueError, match="no idea"):
        trainer.run()
    assert [hook.steps for hook in hooks] == [[1], [1]]


@pytest.mark.training
def test_all_rules_are_checked_after_a_hook_requested_a_stop() -> None:
    class Stops(PeriodicHook):
        name = "stops"

        def after_step(self, state: TrainState, metrics: Metrics) -> str:
            return "enough"

    hook_stop = HookStop()
    trainer = make_trainer(Stops(Cadence(4)), rules=(hook_stop,), hook_stop=hook_stop)
    assert trainer.run().text == "hook stops: enough"
    assert trainer.state.counters.global_step == 4


@pytest.mark.training
@pytest.mark.parametrize("counter", [GLOBAL_STEP, SAMPLES_SEEN])
def test_a_stop_by_a_metric_follows_the_evaluation_where_nothing_else_is_due(
    counter: str, tmp_path: Path
) -> None:
    batch_size = 48
    config = make_config(
        log={"every": 100},
        evaluate={"every": 4 if counter == GLOBAL_STEP else 4 * batch_size, "counter": counter},
        checkpoint={"every": None},
        stop={"last_step": 50, "target_metric": {"metric": "accuracy", "value": 0.0}},
    )
    assert train(config, tmp_path / "run").counters.global_step == 4


@pytest.mark.training
def test_a_signal_is_seen_after_the_step_in_flight() -> None:
    rule = Checks()
    timed = Timed()
    clock = Clock()
    make_trainer(timed, rules=(rule,), signalled=lambda: clock.now == 7, clock=clock).run()
    assert rule.steps == [0, 7]
    assert timed.steps == [1, 7]


@pytest.mark.training
def test_a_signal_that_comes_while_hooks_are_called_is_seen_before_the_next_step() -> None:
    signals: list[str] = []

    class Slow(PeriodicHook):
        name = "slow"

        def after_step(self, state: TrainState, metrics: Metrics) -> None:
            signals.append("came while this hook was called")

    class Signal(StopRule):
        def reason(self, counters: Counters) -> StopReason | None:
            return StopReason("signal", done=False) if signals else None

    trainer = make_trainer(Slow(Cadence(5)), rules=(Signal(),), signalled=lambda: bool(signals))
    trainer.run()
    assert trainer.state.counters.global_step == 5


@pytest.mark.training
def test_a_hook_that_is_due_at_a_time_is_called_at_the_first_step_after_it() -> None:
    hook = Timed(6.5, 9)
    make_trainer(hook, clock=Clock()).run()
    assert hook.steps == [1, 7, 9]


@pytest.mark.training
def test_of_several_hooks_each_is_called_at_its_time() -> None:
    hooks = [Timed(6.5), Timed(3.5), Timed(8.5)]
    make_trainer(*hooks, clock=Clock()).run()
    assert [hook.steps for hook in hooks] == [[1, 7], [1, 4], [1, 9]]


class OtherRanks:
    """Rank 0's link to ranks of which one receives a signal before the fifth step."""

    def __init__(self) -> None:
        self.n_ordered = 0
        self.signalled = False

    def receive_signals(self) -> None:
        self.signalled = self.n_ordered == 4

    def order_step(self) -> None:
        self.n_ordered += 1


@pytest.mark.training
def test_the_signal_of_another_rank_is_seen_before_the_next_step_is_ordered() -> None:
    rule = Checks()
    ranks = OtherRanks()
    make_trainer(rules=(rule,), lead=ranks, signalled=lambda: ranks.signalled).run()
    assert rule.steps == [0, 4]


class Display(ProgressDisplay):
    """Records the steps that it shows."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(title="run", target=12, clock=lambda: clock.now, refresh=4)
        self.steps: list[int] = []

    def open(self, progress: Progress) -> None:
        """Show nothing yet."""

    def update(self, progress: Progress) -> None:
        self.steps.append(progress.step)

    def close(self) -> None:
        """Leave nothing behind."""


@pytest.mark.training
def test_progress_is_shown_where_nothing_else_is_due() -> None:
    clock = Clock()
    display = Display(clock)
    make_trainer(display, clock=clock).run()
    assert display.steps == [1, 5, 9, 12], "at the first step, then every 4 seconds; the last one"


@pytest.mark.training
def test_progress_that_is_enabled_for_one_call_is_shown_in_it() -> None:
    clock = Clock()
    display = Display(clock)
    optional = OptionalProgress()
    trainer = make_trainer(optional, clock=clock)
    trainer.start()
    trainer.train(3)
    with optional.show(display, trainer.state):
        trainer.train()
    assert display.steps == [4, 8, 12, 12], "every 4 seconds, and at the end"


@pytest.mark.training
def test_a_stop_that_the_caller_requested_between_two_calls_is_seen() -> None:
    request = StopRequest(None, remedy="")
    trainer = make_trainer(request, rules=(request,))
    trainer.start()
    trainer.train(3)
    request.request("enough")
    reason = trainer.train(3)
    assert reason is not None
    assert trainer.state.counters.global_step == 3


@pytest.mark.training
def test_a_probe_of_the_threads_is_made_where_nothing_else_is_due() -> None:
    clock = Clock(seconds_per_step=1 / 8)
    probed_at: list[float] = []

    def probe() -> float:
        probed_at.append(clock.now)
        return 1.0

    hook = SlowThreads(probe, warn=lambda ratio: None, clock=lambda: clock.now)
    make_trainer(hook, last_step=60, clock=clock).run()
    assert probed_at == [1, 6], "after a second, then every 5 seconds"


@pytest.mark.training
def test_a_stop_by_a_metric_ends_a_run_in_which_nothing_else_is_due() -> None:
    request = StopRequest(WhenConfig(metric="loss", below=1e9), remedy="")
    trainer = make_trainer(request, rules=(request,))
    trainer.run()
    assert trainer.state.counters.global_step == 1


@pytest.mark.training
def test_a_save_is_made_every_few_seconds_where_nothing_else_is_due() -> None:
    saved: list[int] = []
    clock = Clock()

    def publish(state: TrainState) -> None:
        saved.append(state.counters.global_step)

    with contextlib.closing(Background()) as background:
        hook = make_save(publish, background, lambda: clock.now, every=None, every_seconds=5)
        make_trainer(hook, clock=clock, last_step=20).run()
    assert saved == [5, 10, 15, 20]


@pytest.mark.training
def test_the_error_of_a_save_is_raised_after_the_next_step() -> None:
    def publish(state: TrainState) -> None:
        raise StepctlError("the disk is full")

    with contextlib.closing(Background()) as background:
        hook = make_save(publish, background, every=5)
        trainer = make_trainer(hook, last_step=50)
        with pytest.raises(StepctlError, match="the disk is full"):
            trainer.run()
    assert trainer.state.counters.global_step == 6


@pytest.mark.training
def test_a_stop_file_ends_a_run_in_which_nothing_else_is_due(tmp_path: Path) -> None:
    clock = Clock(seconds_per_step=1 / 8)
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
def test_a_requested_check_comes_after_the_step_in_flight() -> None:
    trainer = make_trainer()
    trainer.start()
    trainer.train(4)
    assert not trainer.is_due
    trainer.request_check()
    trainer.step()
    assert trainer.is_due


@pytest.mark.parametrize("first_step", [None, 1])
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


@pytest.mark.training
def test_a_signal_is_seen_between_two_batches_that_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skipped: list[str] = []

    class Signal(StopRule):
        def reason(self, counters: Counters) -> StopReason | None:
            return StopReason("signal", done=False) if len(skipped) == 3 else None

    assembly = assemble(make_config())
    step = assembly.task.step

    def refuse_the_sixth(state: TrainState, batch: Batch) -> Metrics:
        if state.counters.global_step == 5:
            raise NonFiniteError("the loss is nan")
        return step(state, batch)

    trainer = Trainer(
        assembly.task, assembly.training, assembly.state, stop=[Signal()], skip=skipped.append
    )
    monkeypatch.setattr(assembly.task, "step", refuse_the_sixth)
    trainer.run()
    assert len(skipped) == 3
