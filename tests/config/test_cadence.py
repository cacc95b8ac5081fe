"""Cadences and schedules that count samples: the steps they fall on, also across resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.rundir.directory import RunDirectory
from stepctl.state.counters import SAMPLES_SEEN
from stepctl.state.train_state import TrainState
from stepctl.training.build import prepare
from tests.support.messages import normalize
from tests.support.runs import make_config, resume, rows, train
from tests.support.stops import some_of

LAST, BATCH = 30, 8
SAMPLES = {"counter": SAMPLES_SEEN}
SECTIONS: dict[str, Any] = {
    "data": {
        "name": "tests.support.scripted_task:sixty",
        "batch_size": BATCH,
        "validation_fraction": 0.25,
    },
    "model": {"name": "linear"},
    "optimizer": {
        "name": "sgd",
        "momentum": 0.9,
        "learning_rate": {
            "name": "cosine",
            "peak": 0.1,
            "warmup_steps": 30,
            "decay_steps": 200,
            **SAMPLES,
        },
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
    return sorted(
        row["step"] for row in RunDirectory(path).read_ledger() if row["event"] == "checkpoint"
    )


@pytest.mark.training
def test_it_fires_in_the_step_that_passes_the_value(unbroken: Any) -> None:
    assert steps(unbroken[1], "train") == [1, *passed(20)]
    assert steps(unbroken[1], "eval") == passed(50, 7)
    assert saves(unbroken[1]) == [0, *passed(60)]
    assert passed(60) == [8, 15, 23, 30], "64, 120, 184 and 240 samples"


@pytest.mark.training
def test_a_schedule_follows_the_samples_seen_before_the_update(unbroken: Any) -> None:
    schedule = prepare(make_config(**SECTIONS)).task.learners["model"].optimizer.learning_rate
    for row in rows(unbroken[1]):
        if row["kind"] == "train":
            assert row["learning_rate"] == schedule((row["step"] - 1) * BATCH)
    assert schedule(100) < schedule(30)


@pytest.mark.training
@pytest.mark.parametrize("stop", some_of(range(LAST), every=4))
def test_a_stop_at_any_step_keeps_the_bits_the_rows_and_the_saves(
    stop: int, unbroken: Any, tmp_path: Path
) -> None:
    train(make_config(**{**SECTIONS, "stop": {"last_step": stop}}), tmp_path / "run")
    assert resume(tmp_path / "run", last_step=LAST).same_bits(unbroken[0])
    assert rows(tmp_path / "run") == rows(unbroken[1])
    assert saves(tmp_path / "run") == sorted({stop, *saves(unbroken[1])})


def test_an_open_horizon_is_counted_by_the_schedule_s_counter() -> None:
    rate = {"name": "cosine", "peak": 0.1, **SAMPLES}
    optimizer = {"name": "sgd", "learning_rate": rate}
    config = make_config(**{**SECTIONS, "initial_step": 10, "optimizer": optimizer})
    assert (
        prepare(config).config.rates()["optimizer.learning_rate"]["decay_steps"]
        == (LAST - 10) * BATCH
    )


# --- refused before step 1, in one line that names the key

# assignments by --set -> the key that the message names
REFUSED: dict[tuple[str, ...], str] = {
    ("log.counter=sample_seen",): "log.counter",
    ("evaluate.counter=epoch",): "evaluate.counter",
    ("checkpoint.counter=critic",): "checkpoint.counter",
    ("optimizer.learning_rate.counter=steps",): "optimizer.learning_rate.counter",
    ("evaluate.metric=acuracy",): "evaluate.metric",
    ("stop.early_stopping={patience: 2, metric: f1}",): "stop.early_stopping.metric",
    ("stop.target_metric={value: 1, metric: ema_loss}",): "stop.target_metric.metric",
    ("checkpoint.keep_best={metric: f1, mode: max}",): "checkpoint.keep_best.metric",
    ("stop.early_stopping={patience: 2}", "evaluate.every=null"): "stop.early_stopping",
    ("stop.early_stopping={patience: 0}",): "stop.early_stopping.patience",
    ("stop.early_stopping={patience: 2, min_delta: -1}",): "stop.early_stopping.min_delta",
    ("stop.early_stopping={patience: 2, mode: most}",): "stop.early_stopping.mode",
    ("stop.target_metric={metric: loss}",): "stop.target_metric",
    ("log.every=0",): "log.every",
    ("evaluate.every=0",): "evaluate.every",
    ("checkpoint.every=0",): "checkpoint.every",
    ("evaluate.offset=50",): "evaluate",
    ("stop.num_steps=5",): "stop",
    ("initial_step=31",): "stop.last_step",
    ("ema={decay: 1.5}",): "ema.decay",
    ("evaluate.ema=true",): "evaluate.ema",
}


@pytest.mark.parametrize("assignments", REFUSED, ids=" ".join)
def test_an_impossible_cadence_is_refused_in_one_line(
    assignments: tuple[str, ...], tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.dumps(make_config(**SECTIONS).plain()))
    options = [word for text in assignments for word in ("--set", text)]
    files = ["--config", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, ["train", *files, *options])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f" {REFUSED[assignments]}: " in result.stderr
    assert normalize(result.stderr, HERE=tmp_path) == snapshot
    assert not (tmp_path / "run").exists()
