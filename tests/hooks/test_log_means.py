"""Means and norms in training rows are right across resumes, and change no bit of the training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from tests.support.runs import make_config, resume, rows, train

pytestmark = pytest.mark.training


LAST = 23
SMALL: dict[str, Any] = {
    "data": {
        "name": "tests.support.scripted_task:sixty",
        "batch_size": 8,
        "validation_fraction": 0.25,
    },
    "model": {"name": "linear"},
    "evaluate": {"every": None},
    "stop": {"last_step": LAST},
}
MEANS = {**SMALL, "log": {"every": 5, "means": True, "norms": True}}
NAMES = ("loss", "accuracy", "learning_rate", "gradient_norm", "parameter_norm")


def training_rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in rows(path) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    return train(make_config(**MEANS), path), path


def test_a_mean_covers_every_step_since_the_previous_row(unbroken: Any, tmp_path: Path) -> None:
    train(make_config(**{**SMALL, "log": {"every": 1, "norms": True}}), tmp_path / "every")
    each = {row["step"]: row for row in training_rows(tmp_path / "every")}
    found = training_rows(unbroken[1])
    assert [row["step"] for row in found] == [1, 5, 10, 15, 20, 23]
    before = 0
    for row in found:
        steps = range(before + 1, row["step"] + 1)
        for name in NAMES:
            total = 0.0
            for step in steps:
                total += each[step][name]
            assert row[f"mean_{name}"] == total / len(steps)
            assert row[name] == each[row["step"]][name]
        before = row["step"]
    assert found[2]["mean_loss"] != found[2]["loss"]


@pytest.mark.parametrize("stop", range(LAST))
def test_a_resume_in_between_changes_no_row(stop: int, unbroken: Any, tmp_path: Path) -> None:
    """Each stop writes a row marked extra, which takes nothing from the next."""
    train(make_config(**{**MEANS, "stop": {"last_step": stop}}), tmp_path / "run")
    assert resume(tmp_path / "run", last_step=LAST).same_bits(unbroken[0])
    assert rows(tmp_path / "run") == rows(unbroken[1])


def test_an_extra_row_has_the_means_up_to_it(unbroken: Any, tmp_path: Path) -> None:
    train(make_config(**{**MEANS, "stop": {"last_step": 7}}), tmp_path / "run")
    train(
        make_config(**{**SMALL, "log": {"every": 1}, "stop": {"last_step": 7}}), tmp_path / "every"
    )
    last, (*_, six, seven) = training_rows(tmp_path / "run")[-1], training_rows(tmp_path / "every")
    assert last["extra"]
    assert last["mean_loss"] == (six["loss"] + seven["loss"]) / 2


def test_a_metric_without_a_step_has_no_mean(tmp_path: Path) -> None:
    train(make_config(**{**SMALL, "log": {"every": 5, "means": True}}), tmp_path / "run")
    assert all("mean_gradient_norm" not in row for row in training_rows(tmp_path / "run"))


@pytest.mark.parametrize(
    "assignments", [("log.means=true",), ("log.norms=true",), ("log.means=true", "log.norms=true")]
)
def test_they_can_be_enabled_and_disabled_at_any_resume(
    assignments: tuple[str, ...], unbroken: Any, tmp_path: Path
) -> None:
    train(make_config(**{**SMALL, "log": {"every": 5}, "stop": {"last_step": 7}}), tmp_path / "run")
    resume(tmp_path / "run", last_step=12, assignments=assignments)
    last = training_rows(tmp_path / "run")[-2]
    assert (last["step"], "mean_loss" in last, "gradient_norm" in last) == (
        10, "log.means=true" in assignments, "log.norms=true" in assignments,
    )  # fmt: skip
    off = tuple(text.replace("true", "false") for text in assignments)
    state = resume(tmp_path / "run", last_step=LAST, assignments=off)
    assert state.params.same_bits(unbroken[0].params)
    assert set(training_rows(tmp_path / "run")[-1]) == {
        "step", "kind", "epoch", "loss", "accuracy", "learning_rate", "extra",
    }  # fmt: skip


def test_a_mean_enabled_on_resume_covers_the_steps_since_then(tmp_path: Path) -> None:
    train(make_config(**{**SMALL, "log": {"every": 5}, "stop": {"last_step": 7}}), tmp_path / "run")
    resume(tmp_path / "run", last_step=10, assignments=("log.means=true",))
    train(
        make_config(**{**SMALL, "log": {"every": 1}, "stop": {"last_step": 10}}), tmp_path / "every"
    )
    losses = [row["loss"] for row in training_rows(tmp_path / "every")][7:]
    assert training_rows(tmp_path / "run")[-1]["mean_loss"] == pytest.approx(
        sum(losses) / 3, rel=1e-15
    )


# --- norms


class Weights(Hook):
    """Keeps a copy of the weights after each step."""

    name = "weights"

    def __init__(self) -> None:
        self.params: list[Array] = []

    def start(self, state: TrainState) -> None:
        self.params.append(state.params.flat.copy())

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.params.append(state.params.flat.copy())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_norms_are_of_the_gradient_before_clipping_and_of_the_new_weights(
    clip: float | None, tmp_path: Path
) -> None:
    """Plain descent by a rate of 1: the step is the gradient, or what clipping left of it."""
    optimizer = {"name": "sgd", "learning_rate": 1.0, "clip_norm": clip}
    hook = Weights()
    sections = {
        **SMALL,
        "dtype": "float64",
        "optimizer": optimizer,
        "log": {"every": 1, "norms": True},
    }
    train(make_config(**sections), tmp_path / "run", (hook,))
    found = training_rows(tmp_path / "run")
    assert any(row["gradient_norm"] > 0.5 for row in found)
    for row, (before, after) in zip(found, itertools.pairwise(hook.params), strict=True):
        moved = math.sqrt(math.fsum(np.square(after - before).tolist()))
        assert moved == pytest.approx(min(row["gradient_norm"], clip or math.inf), rel=1e-9)
        assert row["parameter_norm"] == pytest.approx(
            math.sqrt(math.fsum(np.square(after).tolist())), rel=1e-12
        )


def test_asking_for_norms_and_means_changes_no_bit(unbroken: Any, tmp_path: Path) -> None:
    expected = train(make_config(**SMALL), tmp_path / "run")
    for folder, arena in expected.arenas.items():
        assert arena.same_bits(unbroken[0].arenas[folder])
    assert dict(expected.counters) == dict(unbroken[0].counters)
