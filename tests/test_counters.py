"""Cadences and schedules on samples_seen: the steps they fall on, through every stop; and what is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers import make_config, resume, rows, train
from stepctl import yamlio
from stepctl.assembly import prepare
from stepctl.cli.main import cli
from stepctl.rundir import RunDirectory
from stepctl.state import SAMPLES_SEEN, TrainState

LAST, BATCH = 30, 8
SAMPLES = {"counter": SAMPLES_SEEN}
SECTIONS: dict[str, Any] = {
    "data": {"name": "scripted:sixty", "batch_size": BATCH, "validation_fraction": 0.25},
    "model": {"name": "linear"},
    "optimizer": {
        "name": "sgd",
        "momentum": 0.9,
        "learning_rate": {"name": "cosine", "peak": 0.1, "warmup_steps": 30, "decay_steps": 200, **SAMPLES},
    },
    "stop": {"last_step": LAST},
    "log": {"every": 20, "means": True, **SAMPLES},
    "evaluate": {"every": 50, "offset": 7, **SAMPLES},
    "checkpoint": {"every": 60, "keep_last": None, **SAMPLES},
}


def passed(every: int, offset: int = 0) -> list[int]:
    """Return the steps in which some value, every -th from offset on, comes to be among the samples seen."""
    values = range(offset or every, LAST * BATCH + 1, every)
    return sorted({-(-value // BATCH) for value in values})


def steps(path: Path, kind: str) -> list[int]:
    return [row["step"] for row in rows(path) if row["kind"] == kind and not row.get("extra")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    return train(make_config(**SECTIONS), path), path


def saves(path: Path) -> list[int]:
    return sorted(row["step"] for row in RunDirectory(path).read_ledger() if row["event"] == "checkpoint")


def test_it_fires_in_the_step_that_passes_the_value(unbroken: Any) -> None:
    assert steps(unbroken[1], "train") == [1, *passed(20)]
    assert steps(unbroken[1], "eval") == passed(50, 7)
    assert saves(unbroken[1]) == [0, *passed(60)]
    assert passed(60) == [8, 15, 23, 30], "64, 120, 184 and 240 samples"


def test_a_schedule_follows_the_samples_seen_before_the_update(unbroken: Any) -> None:
    schedule = prepare(make_config(**SECTIONS)).task.learners["model"].optimizer.learning_rate
    for row in rows(unbroken[1]):
        if row["kind"] == "train":
            assert row["learning_rate"] == schedule((row["step"] - 1) * BATCH)
    assert schedule(100) < schedule(30)


@pytest.mark.parametrize("stop", range(LAST))
def test_a_stop_at_any_step_keeps_the_bits_the_rows_and_the_saves(stop: int, unbroken: Any, tmp_path: Path) -> None:
    train(make_config(**{**SECTIONS, "stop": {"last_step": stop}}), tmp_path / "run")
    assert resume(tmp_path / "run", last_step=LAST).same_bits(unbroken[0])
    assert rows(tmp_path / "run") == rows(unbroken[1])
    assert saves(tmp_path / "run") == sorted({stop, *saves(unbroken[1])})


def test_a_horizon_left_open_is_that_of_its_counter() -> None:
    rate = {"name": "cosine", "peak": 0.1, **SAMPLES}
    optimizer = {"name": "sgd", "learning_rate": rate}
    config = make_config(**{**SECTIONS, "initial_step": 10, "optimizer": optimizer})
    assert prepare(config).config.rates()["optimizer.learning_rate"]["decay_steps"] == (LAST - 10) * BATCH


# --- refused before step 1, in one line that names the key

REFUSED: list[tuple[tuple[str, ...], str, str]] = [
    (("log.counter=sample_seen",), "log.counter: ", "did you mean 'samples_seen'?"),
    (("evaluate.counter=epoch",), "evaluate.counter: ", "there are: global_step, samples_seen, model"),
    (("checkpoint.counter=critic",), "checkpoint.counter: ", "there are: global_step, samples_seen, model"),
    (("optimizer.learning_rate.counter=steps",), "optimizer.learning_rate.counter: ", "there are: global_step"),
    (("evaluate.metric=acuracy",), "evaluate.metric: ", "did you mean 'accuracy'?"),
    (("stop.early_stopping={patience: 2, metric: f1}",), "stop.early_stopping.metric: ", "allowed: loss, accuracy"),
    (("stop.target_metric={value: 1, metric: ema_loss}",), "stop.target_metric.metric: ", "allowed: loss, accuracy"),
    (("checkpoint.keep_best={metric: f1, mode: max}",), "checkpoint.keep_best.metric: ", "allowed: loss, accuracy"),
    (("stop.early_stopping={patience: 2}", "evaluate.every=null"), "stop.early_stopping: ", "set evaluate.every"),
    (("stop.early_stopping={patience: 0}",), "stop.early_stopping.patience: ", "greater than or equal to 1"),
    (("stop.early_stopping={patience: 2, min_delta: -1}",), "stop.early_stopping.min_delta: ", "or equal to 0"),
    (("stop.early_stopping={patience: 2, mode: most}",), "stop.early_stopping.mode: ", "'min' or 'max'"),
    (("stop.target_metric={metric: loss}",), "stop.target_metric: ", "value is missing"),
    (("log.every=0",), "log.every: ", "greater than or equal to 1"),
    (("evaluate.every=0",), "evaluate.every: ", "greater than or equal to 1"),
    (("checkpoint.every=0",), "checkpoint.every: ", "greater than or equal to 1"),
    (("evaluate.offset=50",), "evaluate: ", "it must be below it"),
    (("stop.num_steps=5",), "stop: ", "give either last_step (absolute) or num_steps"),
    (("initial_step=31",), "stop.last_step: 30 is below initial_step 31", "raise it"),
    (("ema={decay: 1.5}",), "ema.decay: ", "less than"),
    (("evaluate.ema=true",), "evaluate.ema: ", "set ema: {decay: 0.999}"),
]


@pytest.mark.parametrize(("assignments", "where", "remedy"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_what_makes_no_sense_is_one_line_and_exit_2(
    assignments: tuple[str, ...], where: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(yamlio.dumps(make_config(**SECTIONS).plain()))
    sets = [part for text in assignments for part in ("--set", text)]
    arguments = ["train", "--config", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run"), *sets]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert where in line
    assert remedy in line
    assert not (tmp_path / "run").exists()
