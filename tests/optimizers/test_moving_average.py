"""The moving average of the weights: its values, its exact resume, and no effect on training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from stepctl.checkpoint import codec
from stepctl.cli.main import cli
from stepctl.hooks.base import Hook
from stepctl.optimizers import moving_average
from stepctl.programs.base import Metrics
from stepctl.state.arena import Arena, Array, same_bits
from stepctl.state.train_state import TrainState
from stepctl.training.build import prepare
from tests.support.runs import make_config, resume, rows, train

LAST = 20
AVERAGE = {
    "ema": {"decay": 0.9, "warmup": True},
    "evaluate": {"every": 4, "ema": True},
    "stop": {"last_step": LAST},
}


class Weights(Hook):
    """Keeps a copy of the weights after each step, and of the average."""

    name = "weights"

    def __init__(self) -> None:
        self.params: list[Array] = []
        self.average: list[Array] = []

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.params.append(state.params.flat.copy())
        self.average.append(state.arenas["ema"].flat.copy())


def reference(start: Array, params: list[Array], decay: float, warmup: bool) -> list[Array]:
    """Return the averages in float64, one element at a time in the plainest form."""
    averages, average = [], start.astype(np.float64)
    for number, values in enumerate(params, 1):
        d = min(decay, (1 + number) / (10 + number)) if warmup else decay
        average = d * average + (1 - d) * values.astype(np.float64)
        averages.append(average)
    return averages


@pytest.mark.training
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_the_average_of_a_plain_loop(dtype: str, warmup: bool, tmp_path: Path) -> None:
    hook = Weights()
    config = make_config(
        dtype=dtype, ema={"decay": 0.8, "warmup": warmup}, stop={"last_step": LAST}
    )
    start = prepare(config).state.params.flat.copy()
    train(config, tmp_path / "run", (hook,))
    expected = reference(start, hook.params, 0.8, warmup)
    for found, values in zip(hook.average, expected, strict=True):
        np.testing.assert_allclose(
            found, values, rtol=0, atol=3e-7 if dtype == "float32" else 1e-15
        )
    assert np.abs(hook.average[-1] - hook.params[-1]).max() > 1e-3


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(2, 100))
    results = []
    for block in (1 << 16, 7):
        monkeypatch.setattr(moving_average, "_BLOCK", block)
        average, params = Arena({"x": (100,)}, "float32"), Arena({"x": (100,)}, "float32")
        average["x"], params["x"] = values
        moving_average.MovingAverage(0.9).update(average, params, 1)
        results.append(average.flat.tobytes())
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    return train(make_config(**AVERAGE), path), path


@pytest.mark.training
@pytest.mark.parametrize("stop", [0, 1, 2, 7, 8, 19])
def test_it_is_exact_through_a_resume(
    stop: int, unbroken: tuple[TrainState, Path], tmp_path: Path
) -> None:
    train(make_config(**AVERAGE | {"stop": {"last_step": stop}}), tmp_path / "run")
    assert resume(tmp_path / "run", last_step=LAST).same_bits(unbroken[0])
    assert rows(tmp_path / "run") == rows(unbroken[1])


@pytest.mark.training
def test_saves_in_between_change_nothing_and_hold_the_average_of_their_step(
    tmp_path: Path, unbroken: Any
) -> None:
    """A save hands the arrays over while training goes on: no value of a later step may get into the file."""
    hook = Weights()
    state = train(
        make_config(**AVERAGE, checkpoint={"every": 1, "keep_last": None}),
        tmp_path / "run",
        (hook,),
    )
    assert state.same_bits(unbroken[0])
    empty = prepare(make_config(**AVERAGE)).state
    for step, average in enumerate(hook.average, 1):
        with codec.Reader(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.h5") as reader:
            codec.restore(reader, empty)
        assert same_bits(empty.arenas["ema"].flat, average)


def test_an_average_handed_over_is_not_changed_by_later_updates() -> None:
    average, params = (Arena({"x": (5,)}, "float32") for _ in range(2))
    average = average.to_read_only(copy=False)
    params["x"] = 1
    handed = average.snapshot()
    for number in (1, 2):
        moving_average.MovingAverage(0.5).update(average, params, number)
    assert handed["x"].tolist() == [0] * 5
    assert average["x"].tolist() == [0.75] * 5


@pytest.mark.training
def test_training_is_the_same_with_it_and_without(tmp_path: Path, unbroken: Any) -> None:
    without = train(make_config(stop={"last_step": LAST}, evaluate={"every": 4}), tmp_path / "run")
    assert without.params.same_bits(unbroken[0].params)
    assert "ema" not in without.arenas
    kept = [
        {key: value for key, value in row.items() if not key.startswith("ema_")}
        for row in rows(unbroken[1])
    ]
    assert kept == rows(tmp_path / "run")


@pytest.mark.training
def test_evaluations_of_the_average_equal_those_of_a_model_with_its_weights(unbroken: Any) -> None:
    state, path = unbroken
    again = prepare(make_config(**AVERAGE))
    again.state.params.copy_from(state.arenas["ema"])
    assert again.validation is not None
    expected = again.task.evaluate(again.state, again.validation)
    (row,) = (row for row in rows(path) if row["kind"] == "eval" and row["step"] == LAST)
    assert {name: row[f"ema_{name}"] for name in expected} == expected
    assert row["ema_loss"] != row["loss"]


@pytest.mark.training
def test_inspect_shows_it(unbroken: tuple[TrainState, Path]) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(unbroken[1])])
    assert result.exit_code == 0
    assert "ema/dense0/weight" in result.stdout
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(unbroken[1]), "--json"]).stdout)
    assert "ema/dense0/weight" in json.dumps(found)
