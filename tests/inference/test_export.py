"""Exported models: the weights in files, and ONNX graphs that compute the same predictions."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.errors import ConfigError
from stepctl.inference.export import export_model
from stepctl.models import layers
from stepctl.models.layers.base import Elementwise, Layer, Norm
from stepctl.state.arena import Array
from tests.support.messages import normalize
from tests.support.runs import make_config, train
from tests.support.trained_runs import (
    WGAN,
    digits,
    every_layer,
    mlp_outputs,
    softmax,
    train_digits,
)

X, Y = digits()
TOLERANCE = 1e-5  # relative


def call(*arguments: object, expect: int = 0) -> str:
    """Run a command in this process; return stdout, or stderr after an error."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exit_code == expect, result.output
    return result.stderr if expect else result.stdout


def run_onnx(path: Path, **inputs: Array) -> list[Array]:
    """Return the outputs of an ONNX model."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, inputs)
    return found


def test_an_npz_file_has_weights_and_metadata(digits_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    found = json.loads(call("export", digits_run, "-o", path, "--json"))
    model = stepctl.load_model(digits_run)
    assert found == {"step": 30, "output": str(path), "arrays": [*model.parameters]}
    with np.load(path) as archive:
        arrays = dict(archive)
    facts = json.loads(str(arrays.pop("__metadata__")))
    assert {path: array.tobytes() for path, array in arrays.items()} == {
        path: array.tobytes() for path, array in model.parameters.items()
    }
    logits = mlp_outputs(arrays, X * facts["preprocessing"]["factors"])
    np.testing.assert_allclose(model.predict_proba(X), softmax(logits), rtol=TOLERANCE, atol=1e-9)
    assert facts["global_step"] == 30
    assert facts["class_names"] == model.class_names
    assert facts["config"] == model.config == stepctl.load_checkpoint(digits_run).config
    assert facts["config"]["optimizer"]["name"] == "adam"
    assert [layer["layer"] for layer in facts["layout"]["model"]] == [
        "Dense",
        "ReLU",
        "Dropout",
        "Dense",
    ]
    assert facts["layout"]["model"][0]["n_in"] == 64


def test_the_same_model_is_the_same_file(digits_run: Path, tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        call("export", digits_run, "-o", tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.training
def test_a_safetensors_file_has_weights_buffers_and_metadata(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    run = train_digits(tmp_path / "run", model={"name": "mlp", "hidden": [4], "batch_norm": True})
    call("export", run, "-o", tmp_path / "model.safetensors", "--step", 20)
    model = stepctl.load_model(run, step=20)
    expected = model.parameters | model.buffers
    assert "batch_norm0/variance" in expected
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert {*file.keys()} == {*expected}
        for path, array in expected.items():
            assert np.array_equal(file.get_tensor(path), array)
        facts = {key: json.loads(text) for key, text in file.metadata().items()}
    assert facts["config"] == model.config == stepctl.load_checkpoint(run).config
    assert facts["config"]["optimizer"]["name"] == "adam"
    assert facts["layout"]["model"][1]["epsilon"] == 1e-5


def test_the_average_is_exported(digits_run: Path, tmp_path: Path) -> None:
    call("export", digits_run, "-o", tmp_path / "model.npz", "--ema")
    checkpoint = stepctl.load_checkpoint(digits_run)
    with np.load(tmp_path / "model.npz") as archive:
        assert np.array_equal(archive["dense0/bias"], checkpoint.arrays["ema/dense0/bias"])


# --- ONNX


MODELS: dict[str, dict[str, Any]] = {
    "linear": {"model": {"name": "linear"}},
    "layer norm": {"model": {"name": "mlp", "hidden": [9, 5], "layer_norm": True}},
    "gelu": {"model": {"name": "mlp", "hidden": [9], "activation": "gelu"}},
    "batch norm": {"model": {"name": "mlp", "hidden": [9], "batch_norm": True}},
    "float64": {"dtype": "float64", "model": {"name": "mlp", "hidden": [9], "output": "tanh"}},
    "every layer": {"model": {"name": "tests.support.trained_runs:every_layer"}},
}


@pytest.mark.training
@pytest.mark.parametrize("name", MODELS)
def test_an_onnx_model_makes_the_same_predictions(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    run = train_digits(tmp_path / "run", stop={"last_step": 5}, **MODELS[name])
    call("export", run, "-o", tmp_path / "model.onnx")
    model = stepctl.load_model(run)
    x = X.astype(model.config["dtype"])
    predicted, probability = run_onnx(tmp_path / "model.onnx", x=x)
    np.testing.assert_allclose(probability, model.predict_proba(X), rtol=TOLERANCE)
    assert predicted.dtype == np.int64
    assert np.array_equal(predicted, model.predict(X))


def test_every_layer_is_tried() -> None:
    for module in pkgutil.iter_modules(layers.__path__):
        importlib.import_module(f"stepctl.models.layers.{module.name}")
    known = {*Layer.__subclasses__(), *Elementwise.__subclasses__(), *Norm.__subclasses__()}
    known = {kind for kind in known if kind.__module__.startswith("stepctl.models.layers")}
    tried = {type(layer) for layer in every_layer(input_shape=(2,), n_outputs=3).layers}
    assert tried == known - {Elementwise, Norm}


@pytest.mark.training
@pytest.mark.parametrize("task", ["regression", "binary_classification"])
def test_so_do_those_of_other_tasks(task: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    x = np.random.default_rng(0).normal(size=(50, 2, 3))
    np.savez(tmp_path / "a.npz", x=x, y=(x.sum(axis=(1, 2)) > 0).astype(int))
    sections: dict[str, Any] = {
        "data": {"name": "arrays", "path": str(tmp_path / "a.npz"), "batch_size": 8, "scale": 2.5},
        "model": {"name": "mlp", "hidden": [5], "activation": "leaky_relu"},
        "task": {"name": task},
        "evaluate": {},
    }
    train(make_config(**sections), tmp_path / "run")
    model = stepctl.load_model(tmp_path / "run")
    export_model(model, str(tmp_path / "model.onnx"))
    outputs = run_onnx(tmp_path / "model.onnx", x=x.astype(np.float32))
    if task == "regression":
        np.testing.assert_allclose(outputs[0][:, 0], model.predict(x), rtol=TOLERANCE, atol=1e-6)
        return
    assert np.array_equal(outputs[0], model.predict(x))
    np.testing.assert_allclose(outputs[1], model.predict_proba(x), rtol=TOLERANCE)


@pytest.mark.training
def test_the_generator_of_a_wgan_has_an_onnx_form(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    run = train_digits(tmp_path / "run", stop={"last_step": 3}, **WGAN)
    call("export", run, "-o", tmp_path / "model.onnx")
    z = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    weights = stepctl.load_model(run).parameters
    expected = z @ weights["generator/dense0/weight"] + weights["generator/dense0/bias"]
    (samples,) = run_onnx(tmp_path / "model.onnx", latent=z)
    np.testing.assert_allclose(samples, expected, rtol=TOLERANCE, atol=1e-6)


def test_an_onnx_model_names_its_origin(digits_run: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    call("export", digits_run, "-o", tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    facts = {each.key: json.loads(each.value) for each in model.metadata_props}
    assert facts["class_names"] == [str(number) for number in range(10)]
    assert "dense0/weight" in {constant.name for constant in model.graph.initializer}
    assert [model.graph.input[0].name, *(output.name for output in model.graph.output)] == [
        "x",
        "prediction",
        "probability",
    ]


# --- bad input


@pytest.mark.training
def test_models_without_an_onnx_form(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    pytest.importorskip("onnx")
    each: dict[str, dict[str, Any]] = {
        "own": {"model": {"name": "tests.support.user_model:TwoLayers"}},
        "loss": {"model": {"name": "tests.support.loss_models:ByHand"}, "task": {"name": "loss"}},
    }
    found = []
    for name, sections in each.items():
        run = train_digits(tmp_path / name, stop={"last_step": 1}, **sections)
        message = call("export", run, "-o", tmp_path / "model.onnx", expect=2)
        found.append(normalize(message, HERE=tmp_path))
        assert not (tmp_path / "model.onnx").exists()
        call("export", run, "-o", tmp_path / f"{name}.npz")
    assert found == snapshot


@pytest.mark.parametrize("name", ["model.pt", "no/model.npz", "model"])
def test_outputs_that_cannot_be_written(
    name: str, digits_run: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    message = call("export", digits_run, "-o", tmp_path / name, expect=2)
    assert normalize(message, HERE=tmp_path) == snapshot
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("extension", "package"), [("onnx", "onnx"), ("safetensors", "safetensors.numpy")]
)
def test_a_missing_extra_is_one_line(
    extension: str, package: str, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'stepctl\[export\]'"):
        export_model(stepctl.load_model(digits_run), str(tmp_path / f"model.{extension}"))
    assert [*tmp_path.iterdir()] == []
