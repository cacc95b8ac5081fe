"""A model that gives its loss: values, gradients, random numbers, and its errors."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import Config, parse_config
from stepctl.errors import ConfigError
from stepctl.models.trees import leaves
from stepctl.programs.model_loss import ModelLoss
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.rng import NamedGenerators, rng
from stepctl.system import optional
from stepctl.training.assembly import TaskAssembly
from stepctl.training.build import assemble
from tests.support.loss_by_hand import ByHand
from tests.support.loss_models import FIRST_ID, INITIAL, Softmax
from tests.support.messages import normalize
from tests.support.runs import resume, rows, silent, train

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "seed": 3,
    "data": {"name": "digits", "batch_size": 24, "validation_fraction": 0.9},
    "model": {"name": "tests.support.loss_models:Softmax"},
    "task": {"name": "loss"},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "stop": {"last_step": 6},
    "log": {"every": 1},
    "evaluate": {"every": 3},
    "numerics": {"threads": 1},
}
BY_HAND = {"name": "tests.support.loss_by_hand:ByHand"}


def make_config(**sections: Any) -> Config:
    return parse_config(yaml.Document({**BASE, **sections}))


def build(**sections: Any) -> TaskAssembly:
    assembly = assemble(make_config(**sections))
    assert isinstance(assembly, TaskAssembly)
    return assembly


def gradient_of(assembly: TaskAssembly) -> tuple[Arena, float]:
    """Return the gradient and the loss of the first step."""
    assert isinstance(assembly.task, ModelLoss)
    batch = assembly.training.batch(0)
    gradient, metrics = assembly.task.gradient(assembly.state, batch)
    return gradient, metrics["loss"]


@pytest.fixture
def regression(tmp_path: Path) -> dict[str, Any]:
    """Return a data section with two targets a row."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3)).astype("f4")
    np.savez(tmp_path / "data.npz", x=x, y=x @ generator.normal(size=(3, 2)).astype("f4"))
    return {"name": "arrays", "path": str(tmp_path / "data.npz"), "batch_size": 8}


# --- values


@pytest.mark.parametrize("shards", [1, 4])
def test_the_gradient_is_that_of_the_mean_loss_and_the_penalty(shards: int) -> None:
    sections = {"data": {**BASE["data"], "shards": shards}, "dtype": "float64"}
    assembly = build(**sections)
    gradient, loss = gradient_of(assembly)
    model = Softmax(input_shape=(64,))
    params = {path: array.copy() for path, array in assembly.state.params.items()}
    batch = assembly.training.batch(0)

    def objective() -> float:
        tree = model.nested(params)
        total = 0.0
        for shard in range(shards):
            at = slice(shard * 24 // shards, (shard + 1) * 24 // shards)
            draws = NamedGenerators(partial(draw, 0, shard))
            total += model.loss(tree, batch.x[at], batch.y[at], draws).sum()
        return float(total / 24 + model.penalty(tree))

    assert loss == pytest.approx(objective(), rel=1e-12)
    h = 1e-6
    for path, at in (("layers/0/0", (9, 3)), ("layers/0/1", (2,)), ("layers/1/0", (5, 7))):
        before = params[path][at]
        params[path][at] = before + h
        above = objective()
        params[path][at] = before - h
        slope = (above - objective()) / (2 * h)
        params[path][at] = before
        assert abs(slope) > 1e-4, "a gradient of 0 would prove little"
        assert gradient[path][at] == pytest.approx(slope, rel=1e-6), path


def draw(step: int, shard: int, name: str) -> np.random.Generator:
    """Return the generator that a loss draws from."""
    return rng(BASE["seed"], f"step/{name}", step, shard)


def test_gradients_by_hand_are_gradients_of_the_sum(regression: dict[str, Any]) -> None:
    assembly = build(data=regression, model=BY_HAND, evaluate=None)
    gradient, loss = gradient_of(assembly)
    batch = assembly.training.batch(0)
    params = assembly.state.params
    error = batch.x @ params["w"] - batch.y
    assert loss == pytest.approx((error**2).sum(axis=1).mean(), rel=1e-6)
    np.testing.assert_allclose(gradient["w"], 2 * batch.x.T @ error / 8, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["more/0"], 2 * error.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert gradient.keys() == {"w", "more/0", "more/1/0"}


@pytest.mark.parametrize("with_validation", [False, True])
def test_data_without_targets(with_validation: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "x.npz")
    np.savez(path, x=np.random.default_rng(0).normal(size=(40, 6)))
    data: dict[str, Any] = {"name": "arrays", "path": path, "batch_size": 8, "shards": 2}
    sections: dict[str, Any] = {"data": data, "evaluate": None}
    if with_validation:
        sections = {"data": {**data, "validation_fraction": 0.5}}
    config = make_config(**sections, model={"name": "tests.support.loss_models:Autoencoder"})
    with stepctl.create(config.plain(), tmp_path / "run", say=silent) as run:
        run.train()
        assert list(run.state.params) == ["0", "1/w"]
        assert run.state.params["1/w"].any()
    kinds = [row["kind"] for row in rows(tmp_path / "run")]
    assert kinds.count("eval") == (2 if with_validation else 0)


def test_integers_reach_the_loss_as_integers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ids = FIRST_ID + generator.integers(0, 3, (60, 2))
    labels = (ids.sum(axis=1) % 4).astype("u2")
    np.savez(tmp_path / "ids.npz", x=ids, y=labels)
    data = {"name": "arrays", "path": str(tmp_path / "ids.npz"), "batch_size": 30}
    config = make_config(
        data={**data, "validation_fraction": 0.5},
        model={"name": "tests.support.loss_models:Pairs"},
        optimizer={"name": "adam", "learning_rate": 0.1},
        stop={"last_step": 30},
        evaluate={"every": 30},
    )
    with stepctl.create(config.plain(), tmp_path / "run", say=silent) as run:
        run.train()
    assert rows(tmp_path / "run")[-1]["loss"] < 0.3


def test_the_parameters_have_the_dtype_of_the_run_and_the_nesting_of_the_model() -> None:
    for dtype in ("float32", "float64"):
        assembly = build(dtype=dtype)
        params = assembly.state.params
        assert {array.dtype.name for array in params.values()} == {dtype}
        assert list(params) == [f"layers/{i}/{j}" for i, j in itertools.product(range(2), repeat=2)]
        tree = Softmax(input_shape=(64,)).nested(params)
        assert type(tree["layers"]) is list
        assert type(tree["layers"][0]) is tuple
        assert leaves(tree).keys() == params.keys()
    expected = Softmax(input_shape=(64,)).initial_params(
        NamedGenerators(lambda name: rng(BASE["seed"], f"init/{name}"))
    )
    for path, array in leaves(expected).items():
        np.testing.assert_array_equal(params[path], array)


@pytest.mark.training
def test_a_trained_model_predicts(tmp_path: Path) -> None:
    data = {"name": "digits", "batch_size": 48, "validation_fraction": 0.2}
    changes = {"data": data, "optimizer": {"name": "adam", "learning_rate": 0.01}}
    changes["ema"] = {"decay": 0.9}
    config = make_config(**changes, stop={"last_step": 150}, evaluate={"every": 50})
    with stepctl.create(config.plain(), tmp_path / "run", say=silent) as run:
        run.train()
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "eval"]
    assert losses == sorted(losses, reverse=True)
    checkpoint = stepctl.load_checkpoint(tmp_path / "run")
    model = Softmax(input_shape=(64,))
    assembly = build(**changes)
    batch = next(iter(assembly.validation or ()))
    for prefix in ("params/", "ema/"):
        predicted = model.predict(model.nested(checkpoint.arrays, prefix), batch.x)
        assert np.mean(predicted == batch.y.reshape(-1)) > 0.8
    del checkpoint.arrays["ema/layers/1/0"]
    with pytest.raises(ConfigError, match="no array ema/layers/1/0, which Softmax needs"):
        model.nested(checkpoint.arrays, "ema/")


# --- random numbers


class Recording(ByHand):
    """A model that records what it draws."""

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)
        self.drawn: list[tuple[bool, float, float]] = []

    def loss_and_gradients(self, params: Any, x: Array, y: Any, rng: NamedGenerators) -> Any:
        self.drawn.append((rng.training, rng("a").random(), rng("a").random()))
        return super().loss_and_gradients(params, x, y, rng)


def test_draws_depend_on_step_and_shard_and_those_of_an_evaluation_on_its_batch(
    regression: dict[str, Any],
) -> None:
    data = {**regression, "shards": 2, "validation_fraction": 0.5}
    assembly = build(data=data, model={"name": f"{__name__}:Recording"}, stop={"last_step": 2})
    model = assembly.task.learners["model"].model
    assert isinstance(model, Recording)
    for step in range(2):
        assembly.task.step(assembly.state, assembly.training.batch(8 * step))
        assembly.state.counters.advance({"global_step": 1, "samples_seen": 8, "model": 1})
    steps = model.drawn.copy()
    model.drawn.clear()
    assert assembly.validation is not None
    first = assembly.task.evaluate(assembly.state, assembly.validation)
    evaluation = model.drawn.copy()
    assert assembly.task.evaluate(assembly.state, assembly.validation) == first
    assert model.drawn == evaluation * 2
    assert [training for training, _, _ in steps] == [True] * 4
    assert [training for training, _, _ in evaluation] == [False] * 3
    expected = [draw(step, shard, "a").random(2) for step in range(2) for shard in range(2)]
    expected += [rng(3, "evaluation/a", number).random(2) for number in range(3)]
    np.testing.assert_array_equal([drawn[1:] for drawn in steps + evaluation], expected)
    assert len({drawn[1] for drawn in steps + evaluation}) == 7


class GlobalDraws(ByHand):
    """A model that draws from NumPy's global generator."""

    def loss_and_gradients(self, params: Any, x: Array, y: Any, rng: NamedGenerators) -> Any:
        noise = np.random.normal(size=x.shape)  # noqa: NPY002
        return super().loss_and_gradients(params, x + noise, y, rng)


def test_other_random_numbers_are_noticed(
    regression: dict[str, Any], tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    said: list[str] = []
    model = {"name": f"{__name__}:GlobalDraws"}
    config = make_config(data=regression, model=model, evaluate=None, stop={"last_step": 1})
    with stepctl.create(config.plain(), tmp_path / "run", say=said.append) as run:
        run.train()
    assert said[0] == snapshot


def test_an_evaluation_uses_loss_if_there_is_one(regression: dict[str, Any]) -> None:
    data = {**regression, "validation_fraction": 0.5}
    assembly = build(data=data, model={"name": "tests.support.loss_by_hand:Both"})
    assert assembly.task.evaluate(assembly.state, assembly.validation or ()) == {"loss": 7.0}
    assert gradient_of(assembly)[1] != 7.0


def test_the_penalty_is_part_of_an_evaluation_once() -> None:
    without = build(model={**BASE["model"], "decay": 0.0})
    params = without.state.params
    penalty = 0.5 * sum(float((params[f"layers/{i}/0"] ** 2).sum()) for i in range(2))
    losses = []
    for decay in (0.0, 0.5):
        assembly = build(model={**BASE["model"], "decay": decay})
        losses.append(assembly.task.evaluate(assembly.state, assembly.validation or ())["loss"])
    assert losses[1] - losses[0] == pytest.approx(penalty, rel=1e-6)


@pytest.mark.training
def test_another_version_of_autograd_is_no_longer_exact(
    regression: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may compute other bits. A model with its own gradients does not depend on it."""
    train(make_config(stop={"last_step": 2}), tmp_path / "traced")
    by_hand = make_config(data=regression, model=BY_HAND, evaluate=None, stop={"last_step": 2})
    train(by_hand, tmp_path / "by hand")
    installed = optional.version("autograd")
    monkeypatch.setattr(optional, "version", lambda package: f"{package} 99")
    for run in ("traced", "by hand"):
        said: list[str] = []
        resume(tmp_path / run, last_step=3, say=said.append)
        words = f"autograd {installed} -> autograd 99"
        assert any(words in line for line in said) == (run == "traced"), said


# --- errors


def refused(folder: Path, code: int = 2, **sections: Any) -> str:
    """Start a run that ends with an error; return its message."""
    config = folder / "c.yaml"
    config.write_text(yaml.dumps({**BASE, **sections}))
    words = ["train", "--config", str(config), "--run-dir", str(folder / "run"), "-q"]
    done = CliRunner().invoke(cli, words)
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    assert code != 2 or not (folder / "run").exists()
    patterns = (r"(?<=\.py:)\d+", r"note: .*\n")
    return normalize(done.stderr, patterns, ROOT=ROOT, HERE=folder)


BROKEN = "tests.support.loss_models:Broken"
NON_FINITE = ("not finite", "too large for float32")  # initial parameters
MODELS: dict[str, dict[str, Any]] = {
    **{
        f"initial: {wrong}": {"name": BROKEN, "wrong": wrong}
        for wrong in INITIAL
        if wrong not in NON_FINITE
    },
    **{
        f"loss: {wrong}": {"name": BROKEN, "wrong": wrong}
        for wrong in (
            "other shapes",
            "the mean",
            "a column",
            "complex losses",
            "no value",
            "numpy's function",
            "an assignment",
            "an assignment to a traced array",
            "no derivative",
            "a constant",
        )
    },
    "no loss": {"name": "tests.support.loss_models:NoLoss"},
    **{
        f"penalty: {wrong}": {"name": f"{BROKEN}Penalty", "wrong": wrong}
        for wrong in ("an array of penalties", "a whole number", "no penalty")
    },
    "a built-in model": {"name": "linear"},
    "a model with a forward": {"name": "tests.support.user_model:TwoLayers"},
}


@pytest.mark.parametrize("case", MODELS)
def test_a_wrong_model_is_refused_in_one_line(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    assert refused(tmp_path, model=MODELS[case]) == snapshot


@pytest.mark.parametrize(
    "wrong",
    [
        "a write",
        "no gradients",
        "the mean",
        "a missing gradient",
        "one too many",
        "an array of gradients",
        "an empty gradient",
        "none as a gradient",
        "a transposed gradient",
        "a gradient of integers",
    ],
)
def test_wrong_gradients_are_refused_in_one_line(
    wrong: str, tmp_path: Path, regression: dict[str, Any], snapshot: SnapshotAssertion
) -> None:
    model = {**BY_HAND, "wrong": wrong}
    assert refused(tmp_path, data=regression, model=model, evaluate=None) == snapshot


@pytest.mark.parametrize(
    "model",
    [
        {"name": BROKEN, "wrong": "infinite"},
        {"name": BROKEN, "wrong": "not finite"},
        {"name": BROKEN, "wrong": "too large for float32"},
        {"name": f"{BROKEN}Penalty", "wrong": "infinite"},
        {**BY_HAND, "wrong": "infinite gradients"},
    ],
    ids=lambda model: f"{model['name'].partition(':')[2]}, {model['wrong']}",
)
def test_a_loss_that_is_not_finite_stops_the_run(
    model: dict[str, Any], tmp_path: Path, regression: dict[str, Any], snapshot: SnapshotAssertion
) -> None:
    assert refused(tmp_path, 1, data=regression, model=model, evaluate=None) == snapshot


@pytest.mark.parametrize("wrong", ["an attribute of rng", "an error"])
def test_an_error_of_the_model_names_its_line(
    wrong: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    assert refused(tmp_path, 1, model={"name": BROKEN, "wrong": wrong}) == snapshot


@pytest.mark.parametrize("task", ["classification", "wgan"])
def test_another_task_refuses_a_model_without_forward(
    task: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    sections: dict[str, Any] = {"task": {"name": task}, "evaluate": None}
    if task == "wgan":
        sections["task"] = {"name": task, "weight_clip": 0.1}
        sections["model"] = {
            "critic": BASE["model"],
            "generator": {"name": "mlp", "hidden": [4]},
        }
        sections["optimizer"] = dict.fromkeys(("critic", "generator"), BASE["optimizer"])
    assert refused(tmp_path, **sections) == snapshot


# --- the extra


def remove_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "autograd":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tests.support.loss_models")


def test_without_autograd_gradients_by_hand_are_enough(
    regression: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_autograd(monkeypatch)
    data = {**regression, "validation_fraction": 0.5}
    config = make_config(data=data, model=BY_HAND)
    with stepctl.create(config.plain(), tmp_path / "run", say=silent) as run:
        run.train()
    assert run.global_step == 6


class WithLoss(ByHand):
    """A model that needs autograd, in a module that does not import it."""

    def loss(self, params: Any, x: Array, y: Any, rng: NamedGenerators) -> Array:
        raise NotImplementedError

    loss_and_gradients = stepctl.LossModel.loss_and_gradients


class WithPenalty(ByHand):
    """Another."""

    def penalty(self, params: Any) -> float:
        return 0.0


@pytest.mark.parametrize(
    "model", [BASE["model"]["name"], f"{__name__}:WithLoss", f"{__name__}:WithPenalty"]
)
def test_without_autograd_one_line_has_the_pip_command(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    remove_autograd(monkeypatch)
    message = refused(tmp_path, model={"name": model})
    assert message.endswith("; install it with: pip install 'stepctl[autograd]'")
    assert message == snapshot
