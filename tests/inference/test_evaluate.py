"""Evaluation of a run, or of a checkpoint file: the bits of its rows, other data, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.errors import ConfigError
from stepctl.inference.evaluate import class_scores, evaluate
from stepctl.inference.load import Selection
from tests.support.messages import normalize
from tests.support.runs import make_config, train
from tests.support.trained_runs import WGAN, digits, train_digits

X, Y = digits()


def evaluation_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "eval"]


def call(*arguments: object, expect: int = 0) -> str:
    """Run a command in this process; return stdout, or stderr after an error."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exit_code == expect, result.output
    return result.stderr if expect else result.stdout


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("test.csv", "to evaluate on other data: --data path=test.csv"),
        ("my data.csv", "to evaluate on other data: --data 'path=my data.csv'"),
        ("x=x.npy", "to evaluate on other data: --data x=x.npy"),
        (".", "give one run"),
    ],
)
def test_a_file_after_the_run_is_told_its_option(word: str, remedy: str) -> None:
    message = call("evaluate", "runs/a", word, expect=2)
    assert message.endswith(f"Error: Got unexpected extra argument ({word}); {remedy}\n")


def test_the_metrics_have_the_bits_of_the_row(digits_run: Path) -> None:
    rows = evaluation_rows(digits_run)
    assert [row["step"] for row in rows] == [10, 20, 30]
    for row in rows:
        found = evaluate(str(digits_run), Selection(step=row["step"]))
        assert found["metrics"] == {"loss": row["loss"], "accuracy": row["accuracy"]}
        assert (found["step"], found["split"]) == (row["step"], "validation")
        averaged = evaluate(str(digits_run), Selection(step=row["step"], average=True))
        expected = {"loss": row["ema_loss"], "accuracy": row["ema_accuracy"]}
        assert averaged["metrics"] == expected


@pytest.mark.training
@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"name": "linear"}, "task": {"name": "regression"}},
        {"model": {"name": "mlp", "hidden": [16], "batch_norm": True}},
        WGAN,
        {"model": {"name": "tests.support.loss_models:ByHand"}, "task": {"name": "loss"}},
        {"dtype": "float64", "hooks": [{"name": "tests.support.user_hooks:Smoothed"}]},
    ],
    ids=["regression", "batch norm", "wgan", "loss", "float64 and a hook"],
)
def test_so_have_those_of_every_task(sections: dict[str, Any], tmp_path: Path) -> None:
    run = train_digits(tmp_path / "run", **sections)
    for row in evaluation_rows(run):
        found = evaluate(str(run), Selection(step=row["step"]))
        metrics = {key: row[key] for key in row if key not in ("step", "kind")}
        assert found["metrics"] == metrics


def test_confusion_and_scores(digits_run: Path) -> None:
    found = evaluate(str(digits_run), data=["name=digits"])
    model = stepctl.load_model(digits_run)
    predicted = model.predict(X)
    confusion = np.array(found["confusion"])
    for label in range(10):
        for other in range(10):
            expected = np.count_nonzero((label == Y) & (predicted == other))
            assert confusion[label, other] == expected
        scores = found["per_class"][str(label)]
        right = confusion[label, label]
        assert scores["precision"] == right / np.count_nonzero(predicted == label)
        assert scores["recall"] == right / np.count_nonzero(label == Y)
        assert scores["support"] == np.count_nonzero(label == Y)
        harmonic = 2 / (1 / scores["precision"] + 1 / scores["recall"])
        assert scores["f1"] == pytest.approx(harmonic, rel=1e-12)
    assert np.trace(confusion) / len(Y) == found["metrics"]["accuracy"]
    assert found["class_names"] == model.class_names


def test_scores_that_are_undefined_are_none() -> None:
    never_predicted, absent = class_scores(np.array([[0, 3], [0, 0]]))
    assert never_predicted == {"precision": None, "recall": 0, "f1": 0, "support": 3}
    assert absent == {"precision": 0, "recall": None, "f1": 0, "support": 0}
    (unknown,) = class_scores(np.zeros((1, 1), np.int64))
    assert unknown == {"precision": None, "recall": None, "f1": None, "support": 0}


@pytest.mark.process
def test_a_file_alone_evaluates_other_data(lone_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", x=X[:500], y=Y[:500])
    path = f"path={tmp_path / 'test.npz'}"
    found = evaluate(str(lone_file), data=["name=arrays", path])
    predicted = stepctl.load_model(lone_file).predict(X[:500])
    assert found["split"] == "data"
    assert found["metrics"]["accuracy"] == np.mean(predicted == Y[:500])


@pytest.mark.training
def test_other_data_of_a_run_whose_files_are_gone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X[:300], y=Y[:300])
    np.savez(tmp_path / "b.npz", x_train=X[:5], y_train=Y[:5], x_test=X[300:], y_test=Y[300:])
    data = {"name": "arrays", "path": str(tmp_path / "a.npz"), "scale": 1 / 16, "batch_size": 32}
    run = train_digits(tmp_path / "run", data=data | {"validation_fraction": 0.5})
    (tmp_path / "a.npz").unlink()
    found = evaluate(str(run), data=[f"path={tmp_path / 'b.npz'}"])
    predicted = stepctl.load_model(run).predict(X[300:])  # the validation part that it brings
    assert found["metrics"]["accuracy"] == np.mean(predicted == Y[300:])


@pytest.mark.training
def test_moved_data_are_found_where_the_run_has_them_now(tmp_path: Path) -> None:
    place = tmp_path / "a.npz"
    np.savez(place, x=X[:300], y=Y[:300])
    data = {"name": "arrays", "path": str(place), "batch_size": 32, "validation_fraction": 0.5}
    run = train_digits(tmp_path / "run", data=data)
    before = evaluate(str(run), Selection(step=10))
    moved = place.rename(tmp_path / "b.npz")
    with stepctl.resume(run, num_steps=1, overrides={"data.path": moved}, say=print) as resumed:
        resumed.train()
    said: list[str] = []
    assert evaluate(str(run), Selection(step=10), say=said.append) == before
    assert said == []
    np.savez(moved, x=X[300:600], y=Y[300:600])
    evaluate(str(run), say=said.append)
    assert said == [f"warning: {moved}: the data differ from those that the run was trained on"]


@pytest.mark.training
def test_a_program_evaluates_itself(tmp_path: Path) -> None:
    config = {
        "program": {"name": "tests.support.trained_runs:Mean"},
        "stop": {"last_step": 4},
        "evaluate": {"every": 2},
        "checkpoint": {"every": 2},
    }
    with stepctl.create(config, tmp_path / "run", say=lambda line: None) as run:
        run.train()
    for row in evaluation_rows(tmp_path / "run"):
        found = evaluate(str(tmp_path / "run"), Selection(step=row["step"]))
        assert found["metrics"] == {"mean": row["mean"]}
    with pytest.raises(ConfigError, match="evaluates itself"):
        evaluate(str(tmp_path / "run"), data=["path=x"])


def test_the_command(digits_run: Path) -> None:
    found = json.loads(call("evaluate", digits_run, "--json"))
    assert found == evaluate(str(digits_run))
    assert [*found] == ["step", "split", "metrics", "per_class", "confusion", "class_names"]
    shown = call("evaluate", digits_run, "--step", 10, "-v").splitlines()
    assert shown[0] == f"{digits_run}: global step 10, validation"
    assert [line.split()[:1] for line in shown[1:6]] == [
        ["loss"],
        ["accuracy"],
        [],
        ["class"],
        ["0"],
    ]
    assert len(shown) == 3 + 1 + 11 + 1 + 1 + 11
    assert (
        call("evaluate", digits_run).splitlines()
        == call("evaluate", digits_run, "--step", 30).splitlines()
    )


def test_bad_input(digits_run: Path, tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    np.savez(tmp_path / "narrow.npz", x=X[:5, :60], y=Y[:5])
    np.savez(tmp_path / "label.npz", x=X[:5], y=Y[:5] + 10)
    tries: list[tuple[int, list[str]]] = [
        (2, ["--data", f"path={tmp_path / 'narrow.npz'}", "--data", "name=arrays"]),
        (2, ["--data", f"path={tmp_path / 'label.npz'}", "--data", "name=arrays"]),
        (2, ["--data", f"path={tmp_path / 'missing.npz'}", "--data", "name=arrays"]),
        (2, ["--data", "path"]),
        (2, ["--data", "size=3"]),
        (2, ["--data", "name=arrays"]),
        (3, ["--step", "12"]),
    ]
    found = []
    for code, options in tries:
        message = call("evaluate", digits_run, *options, expect=code)
        found.append(normalize(message, HERE=tmp_path, RUN=digits_run))
    assert found == snapshot


@pytest.mark.training
def test_a_run_without_a_validation_part(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    data = {"name": "digits", "batch_size": 64}
    train(make_config(data=data, evaluate={}, stop={"last_step": 1}), tmp_path / "run")
    message = call("evaluate", tmp_path / "run", expect=2)
    assert normalize(message, HERE=tmp_path) == snapshot
