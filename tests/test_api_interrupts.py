"""Ctrl-C in a notebook: the current step completes, KeyboardInterrupt is raised, the run can continue."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import stepctl
from stepctl.checkpoint.store import Store
from stepctl.errors import StepctlError
from stepctl.models.base import Backward
from stepctl.programs.base import Metrics
from stepctl.state.arena import Arena, Array
from stepctl.state.train_state import TrainState
from stepctl.state.workspace import Workspace
from tests.support.runs import BASE, make_config, rows, silent, train
from tests.support.runs import resume as resume_segment
from tests.support.user_model import TwoLayers

pytestmark = pytest.mark.training


LAST, AT = 12, 5
SECTIONS: dict[str, Any] = {
    "stop": {"last_step": LAST},
    "log": {"every": 1},
    "evaluate": {"every": AT},
}
CONFIG = {**BASE, **SECTIONS, "model": {"name": f"{__name__}:Interrupted"}}


def press(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


class Interrupted(TwoLayers):
    """Calls `pressed`, once, in the first pass that it is given for: training, or evaluation."""

    in_training: Callable[[], None] | None = None
    in_evaluation: Callable[[], None] | None = None

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        name = "in_evaluation" if workspace.rng is None else "in_training"
        pressed = getattr(Interrupted, name)
        if pressed is not None:
            setattr(Interrupted, name, None)
            pressed()
        return super().forward(params, x, workspace)


class At(stepctl.Hook):
    """Calls something after a step, once."""

    name = "at"

    def __init__(self, act: Callable[[], None], step: int = AT) -> None:
        self.act, self.step = act, step

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self.step:
            self.step = -1
            self.act()


@pytest.fixture(autouse=True)
def _python_s_own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    Interrupted.in_training = Interrupted.in_evaluation = None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "it was put back"
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    return train(make_config(**SECTIONS, model=CONFIG["model"]), path), rows(path)


def make_steps(run: stepctl.Run, how: str) -> None:
    if how == "train":
        run.train()
    else:
        run.step(LAST)


@pytest.mark.parametrize("how", ["train", "step"])
@pytest.mark.parametrize("where", ["model", "evaluation", "hook", "the last step"])
def test_ctrl_c_completes_the_step_in_flight_and_the_run_can_continue(
    where: str, how: str, unbroken: Any, tmp_path: Path
) -> None:
    hook = (
        At(press, LAST if where == "the last step" else AT)
        if where in ("hook", "the last step")
        else None
    )
    with stepctl.create(CONFIG, tmp_path / "run", hooks=[hook] if hook else [], say=silent) as run:
        run.step(AT - 1)
        if where == "model":
            Interrupted.in_training = press
        if where == "evaluation":
            Interrupted.in_evaluation = press
        with pytest.raises(KeyboardInterrupt):
            make_steps(run, how)
        assert run.global_step == (LAST if where == "the last step" else AT)
        assert len(rows(tmp_path / "run")) >= run.global_step, "no row is held back"
        make_steps(run, how)
        assert run.state.same_bits(unbroken[0])
    assert rows(tmp_path / "run") == unbroken[1]


def test_a_with_that_ctrl_c_ends_saves_the_step_that_was_in_flight(
    unbroken: Any, tmp_path: Path
) -> None:
    def interrupted() -> None:
        with stepctl.create(CONFIG, tmp_path / "run", hooks=[At(press)], say=silent) as run:
            run.train()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Store(tmp_path / "run" / "checkpoints").steps() == [0, AT]
    assert resume_segment(tmp_path / "run").same_bits(unbroken[0])
    assert rows(tmp_path / "run") == unbroken[1]


@pytest.mark.parametrize(("where", "saved"), [("model", [0, AT - 1]), ("hook", [0])])
def test_a_second_ctrl_c_stops_at_once_and_the_last_complete_step_is_saved(
    where: str, saved: list[int], unbroken: Any, tmp_path: Path
) -> None:
    """A checkpoint of a step whose hooks were not all told would not be exact."""
    said: list[str] = []
    hooks = [At(lambda: press(2))] if where == "hook" else []
    run = stepctl.create(CONFIG, tmp_path / "run", hooks=hooks, say=said.append)
    run.step(AT - 1)
    if where == "model":
        Interrupted.in_training = lambda: press(2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(StepctlError, match="failed halfway"):
        run.step()
    run.close()
    assert Store(tmp_path / "run" / "checkpoints").steps() == saved
    go_on = f"continue from step-00000000.h5 with: stepctl resume {tmp_path / 'run'}"
    assert where == "model" or said == [f"{tmp_path / 'run'}: steps 1 to {AT} are lost; {go_on}"]
    assert resume_segment(tmp_path / "run").same_bits(unbroken[0])
    assert rows(tmp_path / "run") == unbroken[1]


@pytest.mark.parametrize("call", ["save", "close"])
def test_ctrl_c_in_a_save_comes_when_it_is_durable(
    call: str, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.publish

    def publish(store: Store, step: int, *arguments: Any) -> str:
        if step == AT:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return real(store, step, *arguments)

    monkeypatch.setattr(Store, "publish", publish)
    run = stepctl.create(CONFIG, tmp_path / "run", say=silent)
    run.step(AT)
    with pytest.raises(KeyboardInterrupt):
        getattr(run, call)()
    assert Store(tmp_path / "run" / "checkpoints").steps() == [0, AT]
    run.close()
    assert resume_segment(tmp_path / "run").same_bits(unbroken[0])


def test_a_handler_of_the_program_s_own_is_left_in_place(tmp_path: Path) -> None:
    seen: list[int] = []

    def own(number: int, frame: object) -> None:
        seen.append(number)

    for handler, times in ((own, 1), (signal.SIG_IGN, 0)):
        seen.clear()
        signal.signal(signal.SIGINT, handler)
        with stepctl.create(CONFIG, tmp_path / str(times), hooks=[At(press)], say=silent) as run:
            assert run.train().done
        assert signal.getsignal(signal.SIGINT) is handler
        assert len(seen) == times
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_run_in_another_thread_leaves_signals_alone(unbroken: Any, tmp_path: Path) -> None:
    found: list[TrainState] = []

    def work() -> None:
        with stepctl.create(CONFIG, tmp_path / "run", say=silent) as run:
            run.train()
            found.append(run.state)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].same_bits(unbroken[0])
