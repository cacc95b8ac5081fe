"""Failures within a segment: the last completed step is saved, or a message names the lost steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.checkpoint.background import Background
from stepctl.checkpoint.store import Store
from stepctl.errors import NonFiniteError, StepctlError, TornUpdate
from stepctl.models.base import ModelShapes
from stepctl.programs.base import Metrics, Task
from stepctl.programs.supervised import Classification
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from stepctl.state.arena import Arena, Array
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from stepctl.writers.jsonl import JSONLines
from tests.support.messages import without_paths
from tests.support.runs import BASE, make_config, resume, rows, train
from tests.support.user_model import TwoLayers

LAST, AT = 20, 13
SAVES = {
    "checkpoint": {"every": 10},
    "stop": {"last_step": LAST},
    "log": {"every": 1},
    "evaluate": {"every": AT},
}


class Gone(BaseException):
    """An error that `except Exception` does not see."""


def config(**sections: Any) -> Any:
    return make_config(**{**SAVES, **sections})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    train(config(), path)
    return path


def fail(
    path: Path, settings: Any, error: type[BaseException], hooks: tuple[stepctl.Hook, ...] = ()
) -> list[str]:
    """Train a run that fails; return what was said, and the error's own line as the last."""
    said: list[str] = []
    with (
        pytest.raises(error) as caught,
        create_run(settings, RunDirectory(path), said.append, hooks) as segment,
    ):
        segment.train()
    return [*said, str(caught.value)]


def saved(path: Path) -> list[int]:
    return Store(path / "checkpoints").steps()


def assert_goes_on_exactly(
    path: Path, unbroken: Path, hooks: tuple[stepctl.Hook, ...] = ()
) -> None:
    resume(path, hooks=hooks)
    assert rows(path) == rows(unbroken)
    name = f"checkpoints/step-{LAST:08d}.h5"
    ours, theirs = (stepctl.load_checkpoint(run / name).arrays for run in (path, unbroken))
    assert {name: array.tobytes() for name, array in theirs.items()}.items() <= {
        name: array.tobytes() for name, array in ours.items()
    }.items()


# --- in a step


class AddsOne(Task):
    """A task of a user's own that adds 1 to all parameters, one array after another, and fails before the last one."""

    targets: ClassVar[Any] = "classes"
    metrics: ClassVar[dict[str, Any]] = {"loss": "min"}
    training_metrics = ("loss",)

    def __init__(self, *, at: int = 0, error: str = "value") -> None:
        self.at, self.error = at, error

    def ends(
        self, n_classes: int | None, sample_shape: Any, target_shape: Any
    ) -> dict[str, ModelShapes]:
        return {"model": ModelShapes(sample_shape, n_classes or 1)}

    def initial_state(self, initial_step: int) -> TrainState:
        state = super().initial_state(initial_step)
        own = Arena(state.params.shapes, state.params.dtype)  # which this task alone writes
        return TrainState(state.counters, {**state.arenas, "params": own}, state.buffers)

    def trial(self, state: TrainState, batch: Any) -> None:
        return

    def step(self, state: TrainState, batch: Any) -> Metrics:
        *others, last = state.params.values()
        for array in others:
            array += 1
        if state.counters.global_step + 1 == self.at:
            self.at = 0
            raise ERRORS[self.error]("halfway")
        last += 1
        return {"loss": float(last.sum())}

    def evaluate(self, state: TrainState, batches: Any, *, average: bool = False) -> Metrics:
        return {"loss": 0.0}


ERRORS: dict[str, Any] = {
    "value": ValueError,
    "exit": SystemExit,
    "gone": Gone,
    "not finite": NonFiniteError,
}


def adds_one(**options: Any) -> dict[str, Any]:
    return {
        "task": {"name": f"{__name__}:AddsOne", "at": AT, **options},
        "checkpoint": {"every": 1000},
    }


@pytest.mark.training
@pytest.mark.parametrize("error", ERRORS)
def test_a_task_that_fails_in_the_middle_of_its_step_is_not_saved(
    error: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    said = fail(tmp_path / "run", config(**adds_one(error=error)), TornUpdate)
    assert saved(tmp_path / "run") == [0]
    (line,) = said
    assert without_paths(line, (r"(?<=\.py:)\d+",), HERE=tmp_path) == snapshot
    state = resume(tmp_path / "run", assignments=("task.at=0",), allow_change=("task.at",))
    assert {float(value) for array in state.params.values() for value in array.flat} == {LAST}


class Unlucky(Classification):
    """A task of a user's own that changes arrays by updates alone, and fails before or after one."""

    def __init__(self, *, at: int, when: str, seed: int, dtype: str, shards: int) -> None:
        super().__init__(seed=seed, dtype=dtype, shards=shards)
        self.at, self.when = at, when

    def step(self, state: TrainState, batch: Any) -> Metrics:
        fails = state.counters.global_step + 1 == self.at
        if fails and self.when == "before":
            raise ValueError("unlucky")
        metrics = super().step(state, batch)
        if fails:
            raise ValueError("unlucky")
        return metrics


@pytest.mark.training
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [AT, 11])
def test_a_task_that_fails_before_its_update_costs_no_step(
    at: int, when: str, unbroken: Path, tmp_path: Path
) -> None:
    task = {"name": f"{__name__}:Unlucky", "at": at, "when": when}
    said = fail(tmp_path / "run", config(task=task), ValueError if when == "before" else TornUpdate)
    if when == "before":
        assert said == [
            f"{tmp_path / 'run'}: the state of global step {at - 1} is saved",
            "unlucky",
        ]
    assert saved(tmp_path / "run") == ([0, 10] if when == "after" or at == 11 else [0, 10, at - 1])
    resume(tmp_path / "run", assignments=("task.at=0",), allow_change=("task.at",))
    assert rows(tmp_path / "run") == rows(unbroken)


def test_a_batch_that_is_skipped_leaves_nothing_of_a_task_s_step(tmp_path: Path) -> None:
    settings = config(**adds_one(error="not finite"), on_nonfinite="skip")
    state = train(settings, tmp_path / "run")
    assert {float(value) for array in state.params.values() for value in array.flat} == {LAST}


class Fails(TwoLayers):
    """A model that raises something in the at-th forward pass of training; those of a first batch are a trial."""

    def __init__(self, *, at: int, error: str, input_shape: Any, n_outputs: int) -> None:
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)
        self.left, self.error = at, error

    def forward(self, params: Any, x: Any, workspace: Any) -> Any:
        self.left -= workspace.rng is not None
        if self.left == 0:
            raise ERRORS[self.error]("enough")
        return super().forward(params, x, workspace)


@pytest.mark.training
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("error", ["value", "exit", "gone"])
def test_an_error_of_a_model_before_the_update_costs_no_step(
    error: str, shards: int, tmp_path: Path
) -> None:
    data = {**BASE["data"], "shards": shards}
    model = {"name": f"{__name__}:Fails", "at": AT * shards + 1 + (shards > 1), "error": error}
    said = fail(tmp_path / "run", config(model=model, data=data), ERRORS[error])
    assert said == [f"{tmp_path / 'run'}: the state of global step {AT - 1} is saved", "enough"]
    assert saved(tmp_path / "run") == [0, 10, AT - 1]
    mended = {"assignments": ("model.at=1000",), "allow_change": ("model.at",)}
    train(config(model={**model, "at": 1000}, data=data), tmp_path / "unbroken")
    assert resume(tmp_path / "run", **mended).same_bits(resume(tmp_path / "unbroken"))
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


# --- in a hook


class Raises(stepctl.Hook):
    """Raises at a step."""

    name = "raises"

    def __init__(self, error: type[BaseException], at: int = AT, event: str = "after_step") -> None:
        self.error, self.at, self.event = error, at, event

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if (state.counters.global_step, self.event) == (self.at, "after_step"):
            raise self.error("of mine")

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        if self.event == "end":
            raise self.error("of mine")


class Sums(stepctl.Hook):
    """Remembers something of every step, in two arrays, between which it may fail."""

    name = "sums"

    def __init__(self, at: int = -1) -> None:
        self.at, self.first, self.second = at, np.zeros(1), np.zeros(1)

    def state(self) -> dict[str, Array]:
        return {"first": self.first, "second": self.second}

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.first += state.counters.global_step
        if state.counters.global_step == self.at:
            raise ValueError("of mine")
        self.second += state.counters.global_step


@pytest.mark.training
@pytest.mark.parametrize("error", [ValueError, SystemExit, Gone])
@pytest.mark.parametrize("first", [True, False])
def test_a_failing_hook_without_saved_state_costs_no_step(
    error: type[BaseException], first: bool, unbroken: Path, tmp_path: Path
) -> None:
    """The hooks after it, which remember, are told of the step too."""
    sums = Sums()
    hooks = (Raises(error), sums) if first else (sums, Raises(error))
    said = fail(tmp_path / "run", config(), error, hooks)
    assert said == [f"{tmp_path / 'run'}: the state of global step {AT} is saved", "of mine"]
    assert saved(tmp_path / "run") == [0, 10, AT]
    sums = Sums()
    assert_goes_on_exactly(tmp_path / "run", unbroken, (sums,))
    assert sums.first.tolist() == sums.second.tolist() == [LAST * (LAST + 1) / 2]


@pytest.mark.training
@pytest.mark.parametrize("first", [True, False])
def test_a_failing_hook_with_saved_state_is_never_saved_half_way(
    first: bool, unbroken: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    sums = Sums(AT)
    hooks = (sums, Raises(ValueError)) if first else (Raises(ValueError), sums)
    said = fail(tmp_path / "run", config(), ValueError, hooks)
    assert [without_paths(line, HERE=tmp_path) for line in said] == snapshot
    assert saved(tmp_path / "run") == [0, 10]
    sums = Sums()
    assert_goes_on_exactly(tmp_path / "run", unbroken, (sums,))
    assert sums.first.tolist() == sums.second.tolist() == [LAST * (LAST + 1) / 2]


@pytest.mark.training
@pytest.mark.parametrize("at", [AT, 10, 11])
def test_an_evaluation_that_fails_says_which_steps_are_lost(
    at: int,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: SnapshotAssertion,
) -> None:
    """A checkpoint of that step would lack its row, and what the best is by it."""
    real = Classification.evaluate

    def evaluate(task: Any, state: TrainState, *arguments: Any, **options: Any) -> Metrics:
        if state.counters.global_step == at:
            raise MemoryError("of mine")
        return real(task, state, *arguments, **options)

    monkeypatch.setattr(Classification, "evaluate", evaluate)
    every = {"evaluate": {"every": at}}
    said = fail(tmp_path / "run", config(**every), MemoryError)
    assert [without_paths(line, HERE=tmp_path) for line in said] == snapshot
    monkeypatch.undo()
    train(config(**every), tmp_path / "whole")
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


# --- at the end, and of the disk


@pytest.mark.training
def test_a_hook_that_fails_at_the_end_costs_no_step(unbroken: Path, tmp_path: Path) -> None:
    said = fail(tmp_path / "run", config(), ValueError, (Raises(ValueError, event="end"),))
    assert said == [f"{tmp_path / 'run'}: the state of global step {LAST} is saved", "of mine"]
    assert saved(tmp_path / "run") == [0, 10, LAST]
    assert rows(tmp_path / "run") == rows(unbroken)


@pytest.mark.training
def test_rows_that_a_full_disk_refuses_are_reported_as_lost_with_their_steps(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    real = JSONLines.write

    def write(writer: JSONLines, some: Any) -> None:
        if any(row["step"] == AT for row in some):
            raise StepctlError("metrics.jsonl: no room")
        real(writer, some)

    monkeypatch.setattr("stepctl.writers.row_buffer.HOLD_SECONDS", 0.0)
    monkeypatch.setattr(JSONLines, "write", write)
    said = fail(tmp_path / "run", config(), StepctlError)
    assert [without_paths(line, HERE=tmp_path) for line in said] == snapshot
    monkeypatch.undo()
    assert_goes_on_exactly(tmp_path / "run", unbroken)


@pytest.mark.training
@pytest.mark.parametrize("times", [1, 2])
def test_a_save_that_fails_is_tried_again_before_the_end(
    times: int,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: SnapshotAssertion,
) -> None:
    real, left = Store.publish, [times]

    def publish(store: Store, step: int, *arguments: Any) -> str:
        if step >= 10 and left[0]:
            left[0] -= 1
            raise StepctlError(f"step {step}: no room")
        return real(store, step, *arguments)

    monkeypatch.setattr(Store, "publish", publish)
    monkeypatch.setattr(Background, "check", Background.finish)  # it is looked at when it has ended
    said = fail(tmp_path / "run", config(), StepctlError)
    path = tmp_path / "run"
    assert [without_paths(line, HERE=tmp_path) for line in said] == snapshot
    assert saved(path) == ([0, 11] if times == 1 else [0])
    monkeypatch.undo()
    assert_goes_on_exactly(path, unbroken)


@pytest.mark.process
def test_a_ledger_line_that_finds_no_room_is_tried_again_and_its_file_stays(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left, path = RunDirectory.append_ledger, [1], tmp_path / "run"

    def append(directory: RunDirectory, event: str, **facts: Any) -> None:
        if event == "checkpoint" and facts["step"] == LAST and left[0]:
            left[0] -= 1
            raise StepctlError("ledger.jsonl: no room")
        real(directory, event, **facts)

    monkeypatch.setattr(RunDirectory, "append_ledger", append)
    said = fail(path, config(), StepctlError)
    assert said == [f"{path}: the state of global step {LAST} is saved", "ledger.jsonl: no room"]
    assert sorted(file.name for file in (path / "checkpoints").iterdir()) == [
        f"step-{step:08d}.h5" for step in (0, 10, LAST)
    ]
    assert verify(str(path))[1] == []
    assert_goes_on_exactly(path, unbroken)
