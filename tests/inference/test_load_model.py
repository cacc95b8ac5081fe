"""Models loaded from a run, or from a checkpoint file alone, and their predictions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.checkpoint import codec
from stepctl.errors import CheckpointError, ConfigError, DataError, StepctlError
from stepctl.inference.row_files import read_chunks
from tests.support.checkpoints import NAME, small_state
from tests.support.messages import without_paths
from tests.support.runs import RUN_ID, file_bytes, make_config, train
from tests.support.trained_runs import digits, mlp_outputs, softmax, train_digits

X, Y = digits()


def test_predictions_are_those_of_plain_numpy_with_the_weights(digits_run: Path) -> None:
    model = stepctl.load_model(digits_run)
    logits = mlp_outputs(model.parameters, X / 16)
    predicted = model.predict(X)
    assert predicted.dtype == np.int64
    assert np.array_equal(predicted, logits.argmax(axis=1))
    np.testing.assert_allclose(model.predict_proba(X), softmax(logits), rtol=2e-5, atol=1e-9)
    assert model.class_names == [str(number) for number in range(10)]
    assert model.global_step == 30
    assert np.mean(predicted == Y) > 0.7


def test_a_row_has_the_same_bits_in_every_call(digits_run: Path) -> None:
    model = stepctl.load_model(digits_run)
    whole = model.predict_proba(X)
    assert np.array_equal(whole[1024:], model.predict_proba(X[1024:]))
    assert np.array_equal(whole, stepctl.load_model(digits_run).predict_proba(X.tolist()))


@pytest.mark.process
def test_a_file_alone_is_enough(digits_run: Path, lone_file: Path) -> None:
    model = stepctl.load_model(lone_file)
    expected = stepctl.load_model(digits_run).predict_proba(X[:100])
    assert np.array_equal(model.predict_proba(X[:100]), expected)


@pytest.mark.training
def test_without_the_training_data(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(size=(40, 2, 3))
    np.savez(tmp_path / "a.npz", x=samples, y=samples.sum(axis=(1, 2)))
    data = {"name": "arrays", "path": str(tmp_path / "a.npz"), "batch_size": 8, "scale": 0.5}
    run = tmp_path / "run"
    sections: dict[str, Any] = {
        "data": data,
        "model": {"name": "linear"},
        "task": {"name": "regression"},
        "evaluate": {},
        "stop": {"last_step": 5},
    }
    train(make_config(**sections), run)
    (tmp_path / "a.npz").unlink()
    model = stepctl.load_model(run)
    weights = model.parameters
    expected = samples.reshape(40, 6) / 2 @ weights["dense0/weight"] + weights["dense0/bias"]
    predicted = model.predict(samples)
    np.testing.assert_allclose(predicted, expected[:, 0], rtol=1e-5, atol=1e-6)
    assert np.array_equal(predicted, model.predict(samples.reshape(40, 6)))
    assert model.class_names is None


def test_the_step_the_best_and_the_average(digits_run: Path) -> None:
    def first_weights(**selection: Any) -> Any:
        return stepctl.load_model(digits_run, **selection).parameters["dense0/bias"]

    for step in (0, 10, 20, 30):
        found = stepctl.load_checkpoint(digits_run / "checkpoints" / f"step-{step:08}.h5")
        assert np.array_equal(first_weights(step=step), found.arrays["params/dense0/bias"])
        assert np.array_equal(first_weights(step=step, ema=True), found.arrays["ema/dense0/bias"])
    rows = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
    best = min(losses, key=lambda step: losses[step])
    assert stepctl.load_model(digits_run, best=True).global_step == best


@pytest.mark.training
def test_binary_classification_has_two_probabilities(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    np.savez(tmp_path / "a.npz", x=x, y=(x[:, 0] > 0).astype(int))
    sections: dict[str, Any] = {
        "data": {"name": "arrays", "path": str(tmp_path / "a.npz"), "batch_size": 8},
        "model": {"name": "linear"},
        "task": {"name": "binary_classification"},
        "evaluate": {},
    }
    train(make_config(**sections), tmp_path / "run")
    model = stepctl.load_model(tmp_path / "run")
    z = x @ model.parameters["dense0/weight"][:, 0] + model.parameters["dense0/bias"][0]
    expected = np.stack([1 / (1 + np.exp(z)), 1 / (1 + np.exp(-z))], axis=1)
    np.testing.assert_allclose(model.predict_proba(x), expected, rtol=1e-5)
    assert np.array_equal(model.predict(x), (z > 0).astype(int))
    assert model.class_names == ["0", "1"]


@pytest.mark.training
def test_a_live_run_predicts_with_its_weights(tmp_path: Path) -> None:
    config = make_config(stop={"last_step": 8}, ema={"decay": 0.5}).plain()
    with stepctl.create(config, tmp_path / "run", say=lambda line: None) as run:
        before = run.predict(X[:50])
        run.train()
        after = run.predict(X[:50])
        averaged = run.predict(X[:50], average=True)
    assert not np.array_equal(before, after)
    model = stepctl.load_model(tmp_path / "run")
    assert np.array_equal(after, model.predict(X[:50]))
    assert np.array_equal(averaged, stepctl.load_model(tmp_path / "run", ema=True).predict(X[:50]))


# --- a model of one's own


@pytest.fixture
def own_model_file(tmp_path: Path) -> Path:
    model = {"name": "tests.support.user_model:TwoLayers"}
    train(make_config(model=model, stop={"last_step": 1}), tmp_path / "own")
    copy = tmp_path / "own.h5"
    shutil.copy(tmp_path / "own" / "checkpoints" / "step-00000001.h5", copy)
    return copy


@pytest.mark.process
def test_a_model_of_ones_own_is_imported_where_a_run_or_the_user_names_it(
    own_model_file: Path, snapshot: SnapshotAssertion
) -> None:
    run = own_model_file.with_suffix("")
    expected = stepctl.load_model(run).predict_proba(X[:20])
    name = "tests.support.user_model:TwoLayers"
    model = stepctl.load_model(own_model_file, imports=[name])
    assert np.array_equal(model.predict_proba(X[:20]), expected)
    with pytest.raises(ConfigError) as refusal:
        stepctl.load_model(own_model_file)
    assert without_paths(str(refusal.value), HERE=own_model_file.parent) == snapshot


@pytest.mark.process
def test_a_file_runs_no_code_that_it_names(own_model_file: Path, tmp_path: Path) -> None:
    """Neither as a model nor as a task; with another run beside it, too."""
    marker = tmp_path / "ran"
    calls = "subprocess:getoutput"
    for section in ("model", "task"):
        config = make_config(stop={"last_step": 1}).plain()
        config[section] = {"name": calls, "cmd": f"touch {marker}"}
        text = stepctl.config.yaml.dumps(config)  # type: ignore[attr-defined]
        hostile = tmp_path / NAME
        image = codec.encode(small_state(), run="r", run_id=RUN_ID, config=text, numerics="{}")
        hostile.write_bytes(file_bytes(image))
        with pytest.raises(ConfigError, match="--import"):
            stepctl.load_model(hostile)
        hostile.unlink()
    assert not marker.exists()


@pytest.mark.training
def test_a_loss_model_predicts_by_its_own_method(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"task": {"name": "loss"}, "stop": {"last_step": 1}}
    names = ("tests.support.trained_runs:Predicting", "tests.support.loss_models:ByHand")
    for number, name in enumerate(names):
        train(make_config(model={"name": name}, **sections), tmp_path / str(number))
    model = stepctl.load_model(tmp_path / "0")
    weights = model.parameters
    linear = (X / 16).astype(np.float32) @ weights["w"] + weights["more/0"]
    np.testing.assert_allclose(model.predict(X), weights["more/1/0"] * linear, rtol=1e-4)
    with pytest.raises(ConfigError, match="define predict"):
        stepctl.load_model(tmp_path / "1").predict(X)


@pytest.mark.training
def test_integers_stay_integers_for_a_model_that_takes_them(tmp_path: Path) -> None:
    ids = 33554433 + np.arange(40).reshape(20, 2)  # equal to their neighbors in float32
    np.savez(tmp_path / "a.npz", x=ids, y=np.arange(20.0))
    sections: dict[str, Any] = {
        "data": {"name": "arrays", "path": str(tmp_path / "a.npz"), "batch_size": 5},
        "model": {"name": "tests.support.token_model:Embedding"},
        "task": {"name": "regression"},
        "evaluate": {},
    }
    train(make_config(stop={"last_step": 3}, **sections), tmp_path / "run")
    model = stepctl.load_model(tmp_path / "run")
    expected = model.parameters["table"][ids % 7].sum(axis=(1, 2))
    np.testing.assert_allclose(model.predict(ids), expected, rtol=1e-6)
    np.savetxt(tmp_path / "ids.csv", ids, "%d", delimiter=",")
    (chunk,) = read_chunks(str(tmp_path / "ids.csv"), model.inputs)
    assert chunk.batches[0].dtype == np.int64


@pytest.mark.training
def test_a_program_has_no_model(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    config = {
        "program": {"name": "tests.support.sampler:Sampler"},
        "stop": {"last_step": 2},
    }
    path = tmp_path / "run"
    with stepctl.create(config, path, say=lambda line: None) as run:
        run.train()
        with pytest.raises(ConfigError) as live:
            run.predict(X)
    with pytest.raises(ConfigError) as loaded:
        stepctl.load_model(path)
    found = [without_paths(str(each.value), HERE=tmp_path) for each in (live, loaded)]
    assert found == snapshot


# --- bad input


@pytest.mark.parametrize(
    "x",
    [np.zeros((3, 63)), np.zeros(64), [["a"] * 64], np.full((2, 64), np.nan), np.zeros(())],
    ids=["columns", "one row", "text", "nan", "number"],
)
def test_wrong_x_is_refused(x: Any, digits_run: Path, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(DataError) as refusal:
        stepctl.load_model(digits_run).predict(x)
    assert str(refusal.value) == snapshot


@pytest.mark.process
def test_wrong_selections_are_refused(
    digits_run: Path, lone_file: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "empty").mkdir()
    tries: list[tuple[Path, dict[str, Any], type[StepctlError]]] = [
        (digits_run, {"step": 11}, CheckpointError),
        (digits_run, {"step": 10, "best": True}, ConfigError),
        (lone_file, {"step": 10}, ConfigError),
        (lone_file, {"best": True}, ConfigError),
        (tmp_path / "empty", {}, ConfigError),
        (tmp_path / "missing", {}, CheckpointError),
    ]
    found = []
    for path, selection, kind in tries:
        with pytest.raises(kind) as refusal:
            stepctl.load_model(path, **selection)
        found.append(without_paths(str(refusal.value), HERE=tmp_path, RUN=digits_run))
    assert found == snapshot


@pytest.mark.training
def test_a_run_without_them_has_no_best_and_no_average(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    run = train_digits(tmp_path / "run", evaluate={}, stop={"last_step": 1})
    found = []
    selections: list[dict[str, Any]] = [{"best": True}, {"ema": True}]
    for selection in selections:
        with pytest.raises(ConfigError) as refusal:
            stepctl.load_model(run, **selection)
        found.append(without_paths(str(refusal.value), HERE=tmp_path))
    assert found == snapshot


@pytest.mark.training
def test_probabilities_are_a_classifiers(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    sections: dict[str, Any] = {"model": {"name": "linear"}, "task": {"name": "regression"}}
    run = train_digits(tmp_path / "run", stop={"last_step": 1}, **sections)
    with pytest.raises(ConfigError) as refusal:
        stepctl.load_model(run).predict_proba(X)
    assert without_paths(str(refusal.value), HERE=tmp_path) == snapshot


@pytest.mark.process
def test_a_damaged_file_is_refused(lone_file: Path) -> None:
    content = bytearray(lone_file.read_bytes())
    content[-100] ^= 1
    lone_file.write_bytes(content)
    code = f"import stepctl; stepctl.load_model({str(lone_file)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sha256 mismatch" in done.stderr


@pytest.mark.process
def test_a_checkpoint_without_recorded_shapes_takes_them_from_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As stepctl 0.2 wrote them."""
    from stepctl.config.model import DataConfig

    run = train_digits(tmp_path / "run", stop={"last_step": 1})
    expected = stepctl.load_model(run).predict_proba(X[:9])
    path = run / "checkpoints" / "step-00000001.h5"
    with codec.Reader(path) as reader:
        config = stepctl.config.yaml.loads(reader.header.config, "c").value  # type: ignore[attr-defined]
    for key in ("sample_shape", "target_shape", "scale"):
        assert config["data"].pop(key) is not None
    assert "sample_shape" in DataConfig.model_fields
    resumed = stepctl.resume(run, say=lambda line: None)
    text = stepctl.config.yaml.dumps(config)  # type: ignore[attr-defined]
    image = codec.encode(resumed.state, run="run", run_id=RUN_ID, config=text, numerics="{}")
    resumed.close()
    old = tmp_path / "step-00000001.h5"
    old.write_bytes(file_bytes(image))
    assert np.array_equal(stepctl.load_model(old).predict_proba(X[:9]), expected)
