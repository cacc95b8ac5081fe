"""`on_nonfinite: skip` resumes exactly, also between a skipped batch and the next step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepctl.config.model import Config
from stepctl.errors import NonFiniteError
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import create_run, resume_run
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason, StopRule
from stepctl.training.trainer import MAX_SKIPPED
from tests.support.runs import resume, rows, silent, train
from tests.support.stops import some_of, some_stops
from tests.training.test_non_finite import spoiled

LAST, BATCH = 24, 4
BAD = (3, 17, 18, 40)  # of 64 samples, in epochs of 16 batches
SAMPLES = {"counter": "samples_seen"}


def config(tmp_path: Path, last_step: int = LAST, *bad: int, **sections: Any) -> Config:
    known = {
        "stop": {"last_step": last_step},
        "log": {"every": 10, "means": True, **SAMPLES},
        "ema": {"decay": 0.9},
    }
    return spoiled(tmp_path, *(bad or BAD), on_nonfinite="skip", **known | sections)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path, list[str]]:
    """The final state, the path, and what was said."""
    path, said = tmp_path_factory.mktemp("unbroken"), list[str]()
    with create_run(config(path), RunDirectory(path / "run"), said.append) as segment:
        segment.train()
        return segment.state, path / "run", said


def assert_as_unbroken(path: Path, state: TrainState, unbroken: Any) -> None:
    assert state.same_bits(unbroken[0])
    assert rows(path) == rows(unbroken[1])


@pytest.mark.training
def test_every_batch_counts_as_seen_whether_it_made_a_step_or_not(unbroken: Any) -> None:
    state, path, said = unbroken
    assert len(said) >= 3
    assert state.counters.samples_seen == (LAST + len(said)) * BATCH
    (end,) = (row for row in RunDirectory(path).read_ledger() if row["event"] == "end")
    assert end["skipped_batches"] == len(said)


@pytest.mark.training
@pytest.mark.parametrize("stop", some_stops(LAST, every=4))
def test_stopped_at_any_step(stop: int, unbroken: Any, tmp_path: Path) -> None:
    train(config(tmp_path, stop), tmp_path / "run")
    assert_as_unbroken(tmp_path / "run", resume(tmp_path / "run", last_step=LAST), unbroken)


REFUSING = {"name": "tests.support.user_model:Refuses", "above": 1e30}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    """The final state and the path of a run whose model refuses some batches itself."""
    path = tmp_path_factory.mktemp("refusing")
    return train(config(path, model=REFUSING), path / "run"), path / "run"


@pytest.mark.training
@pytest.mark.parametrize("stop", some_stops(LAST, every=6))
def test_stopped_before_a_batch_that_the_model_itself_refuses(
    stop: int, refusing: tuple[TrainState, Path], tmp_path: Path
) -> None:
    """A resume tries that batch before it begins, and goes on all the same."""
    assert refusing[0].counters.samples_seen > LAST * BATCH, "some batch was refused"
    train(config(tmp_path, stop, model=REFUSING), tmp_path / "run")
    assert_as_unbroken(tmp_path / "run", resume(tmp_path / "run", last_step=LAST), refusing)


class Asked(StopRule):
    """Stops at the n-th time it is asked: once before every batch, also after one that was skipped."""

    def __init__(self, n: int) -> None:
        self._left = n

    def reason(self, counters: Counters) -> StopReason | None:
        self._left -= 1
        return StopReason("signal", done=False) if self._left < 0 else None

    def due_step(self, step: int) -> float:
        return step


@pytest.mark.training
@pytest.mark.parametrize("batches", some_of(range(LAST), every=3))
def test_stopped_before_any_batch(batches: int, unbroken: Any, tmp_path: Path) -> None:
    with create_run(config(tmp_path), RunDirectory(tmp_path / "run"), silent) as segment:
        outcome = segment.train(stop=[Asked(batches)])
    assert outcome.step <= batches
    assert_as_unbroken(tmp_path / "run", resume(tmp_path / "run"), unbroken)


@pytest.mark.training
def test_one_of_these_stops_came_right_after_a_skipped_batch(tmp_path: Path) -> None:
    """Two stops with a batch more between them, at one step: the second saw a batch that made none."""
    steps = []
    for batches in range(16):
        with create_run(
            config(tmp_path), RunDirectory(tmp_path / f"run{batches}"), silent
        ) as segment:
            steps.append(segment.train(stop=[Asked(batches)]).step)
    assert len(set(steps)) < len(steps)


class Killed(BaseException):
    """Stands for the end of a process that could not help it."""


def kill(say: Callable[[str], None], at: int) -> Callable[[str], None]:
    """Return a `say` that ends the run when it is told of the at-th skipped batch."""
    left = [at]

    def told(message: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        say(message)

    return told


@pytest.mark.training
@pytest.mark.parametrize("at", [1, 2, 3])
def test_killed_while_a_batch_is_skipped(at: int, unbroken: Any, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    made = config(tmp_path, checkpoint={"every": 3})
    with create_run(made, directory, kill(silent, at)) as segment, pytest.raises(Killed):
        segment.train()
    assert_as_unbroken(tmp_path / "run", resume(tmp_path / "run"), unbroken)


class Positions(Hook):
    """Notes the samples seen after each step."""

    name = "positions"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.seen.append(state.counters.samples_seen)


def test_samples_of_a_skipped_batch_are_counted_with_the_next_step(tmp_path: Path) -> None:
    hook = Positions()
    train(config(tmp_path), tmp_path / "run", (hook,))
    moved = [after - before for before, after in zip([0, *hook.seen], hook.seen, strict=False)]
    assert set(moved) > {BATCH}
    assert all(by % BATCH == 0 for by in moved)


@pytest.mark.training
def test_after_too_many_in_a_row_the_samples_are_not_counted_and_none_is_lost(
    tmp_path: Path,
) -> None:
    """The run that gave up stands where the last good step left it, and a resume finds the same batches again."""
    with pytest.raises(NonFiniteError):
        train(config(tmp_path, LAST, *range(64)), tmp_path / "run")
    said: list[str] = []
    with resume_run(RunDirectory(tmp_path / "run"), ResumeOptions(), said.append) as segment:
        assert segment.state.counters.samples_seen == 0
        with pytest.raises(NonFiniteError):
            segment.train()
    assert sum("skipped" in line for line in said) == MAX_SKIPPED
