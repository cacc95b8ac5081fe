"""Every NumPy number is a metric in every writer; other values give one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.errors import StepctlError
from tests.support.messages import without_paths
from tests.support.metrics_task import NUMBERS, WRONG
from tests.support.runs import BASE, make_config, resume, rows, train

SECTIONS: dict[str, Any] = {
    "task": {"name": "tests.support.metrics_task:Measures"},
    "stop": {
        "last_step": 6,
        "early_stopping": {"patience": 50},
        "target_metric": {"metric": "accuracy", "value": 2.0},
    },
    "log": {"every": 2, "means": True, "csv": True},
    "evaluate": {"every": 3, "ema": True},
    "ema": {"decay": 0.9},
    "checkpoint": {"every": 3, "keep_best": {"metric": "accuracy", "mode": "max"}},
}


def assert_plain(row: dict[str, Any], prefix: str = "") -> None:
    for name, (_, value) in NUMBERS.items():
        assert row[f"{prefix}{name}"] == value
        assert type(row[f"{prefix}{name}"]) in (int, float)


@pytest.mark.process
def test_scalars_of_numpy_go_wherever_metrics_go(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.dumps({**BASE, **SECTIONS}))
    run = tmp_path / "run"
    command = ["train", "-v", "--config", str(tmp_path / "config.yaml"), "--run-dir", str(run)]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.stderr
    assert "float32 0.1  " in done.stderr
    train_rows = [row for row in rows(run) if row["kind"] == "train"]
    for row in train_rows:
        assert_plain(row)
        assert_plain(row, "mean_")
    for row in (row for row in rows(run) if row["kind"] == "eval"):
        assert_plain(row)
        assert_plain(row, "ema_")
    lines = (run / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows(run))
    assert CliRunner().invoke(cli, ["verify", str(run)]).exit_code == 0


@pytest.mark.training
def test_they_change_no_row_through_a_resume(tmp_path: Path) -> None:
    train(make_config(**SECTIONS), tmp_path / "unbroken")
    train(
        make_config(**{**SECTIONS, "stop": {**SECTIONS["stop"], "last_step": 4}}), tmp_path / "run"
    )
    resume(tmp_path / "run", last_step=6)
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


@pytest.mark.training
def test_they_go_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tests.writers.test_writers import check_curves, curves

    train(make_config(**{**SECTIONS, "log": {"every": 2, "tensorboard": True}}), tmp_path / "run")
    check_curves(tmp_path / "run")
    found = curves(tmp_path / "run")
    for name, (_, value) in NUMBERS.items():
        assert found[f"train/{name}"] == pytest.approx({1: value, 2: value, 4: value, 6: value})


def test_the_library_returns_plain_numbers(tmp_path: Path) -> None:
    with stepctl.create({**BASE, **SECTIONS}, tmp_path / "run", say=lambda line: None) as run:
        for found in (run.step(), run.evaluate()):
            assert found is not None
            assert_plain(found)
            json.dumps(found)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_metric_that_is_not_a_number_is_one_clear_line(wrong: str, tmp_path: Path) -> None:
    task = {"name": "tests.support.metrics_task:Measures", "wrong": wrong}
    with pytest.raises(StepctlError) as caught:
        train(make_config(task=task), tmp_path / "run")
    message = str(caught.value)
    assert f"task: step returned the metric 'odd' {WRONG[wrong][1]}; a number is needed" in message
    assert "\n" not in message


@pytest.mark.training
def test_metrics_are_a_dict_and_leave_a_row_its_own_names(tmp_path: Path) -> None:
    for task, words in (
        (
            {"name": "tests.support.metrics_task:Measures", "wrong": "none", "whole": True},
            "task: step returned a NoneType; a dict of num",
        ),
        (
            {"name": "tests.support.metrics_task:TakesAName"},
            "task: step returned a metric 'step', which every row has; give it another",
        ),
    ):
        with pytest.raises(StepctlError, match=words):
            train(make_config(task=task), tmp_path / task["name"].partition(":")[2])


@pytest.mark.training
def test_an_evaluation_that_leaves_out_a_declared_metric_is_one_clear_line(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(StepctlError) as caught:
        train(
            make_config(task={"name": "tests.support.metrics_task:LeavesOneOut"}), tmp_path / "run"
        )
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
