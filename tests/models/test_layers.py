"""Layers: the forward pass is the named function, the backward pass its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.data.batches import Batch
from stepctl.distributed.comm import SINGLE_PROCESS
from stepctl.models import layers
from stepctl.models.base import Model, ModelShapes
from stepctl.models.layers.base import Layer
from stepctl.models.layers.batch_norm import BatchNorm
from stepctl.models.layers.dense import Dense
from stepctl.models.layers.dropout import Dropout
from stepctl.models.layers.gelu import GELU
from stepctl.models.layers.layer_norm import LayerNorm
from stepctl.models.layers.leaky_relu import LeakyReLU
from stepctl.models.layers.relu import ReLU
from stepctl.models.layers.sigmoid import Sigmoid
from stepctl.models.layers.tanh import Tanh
from stepctl.optimizers.schedules import Constant
from stepctl.optimizers.sgd import SGD
from stepctl.programs.learner import MODEL, Learner
from stepctl.programs.supervised import Regression
from stepctl.state.arena import Arena, Array, Shape, same_bits
from stepctl.state.rng import rng
from stepctl.state.workspace import Workspace

LAYERS: dict[str, Callable[[int], Layer]] = {
    "dense": lambda width: Dense(name="layer", n_in=width, n_out=3),
    "dense without bias": lambda width: Dense(name="layer", n_in=width, n_out=3, bias=False),
    "dense to one": lambda width: Dense(name="layer", n_in=width, n_out=1),
    "relu": lambda width: ReLU(),
    "leaky_relu": lambda width: LeakyReLU(slope=0.2),
    "tanh": lambda width: Tanh(),
    "sigmoid": lambda width: Sigmoid(),
    "gelu": lambda width: GELU(),
    "dropout": lambda width: Dropout(name="layer", rate=0.4),
    "layer_norm": lambda width: LayerNorm(name="layer", n_features=width),
    "layer_norm, large epsilon": lambda width: LayerNorm(
        name="layer", n_features=width, epsilon=0.5
    ),
    "batch_norm": lambda width: BatchNorm(name="layer", n_features=width),
    "batch_norm, large epsilon": lambda width: BatchNorm(
        name="layer", n_features=width, epsilon=0.5
    ),
}
SHAPES = [(1, 1), (1, 6), (2, 1), (5, 2), (7, 11)]
# one row has no variance
PAIRS = [
    (name, shape) for name in LAYERS for shape in SHAPES if shape[0] > 1 or "batch_norm" not in name
]
H = 1e-5


def training_rng(name: str) -> np.random.Generator:
    return rng(0, f"step/{name}", 3, 0)


def away_from_zero(random: np.random.Generator, shape: Shape) -> Array:
    """Normal values with a margin around 0, where the rectifiers have no derivative."""
    x = random.normal(size=shape)
    return x + 0.1 * np.sign(x)


def begin_training(layer: Layer, workspace: Workspace) -> None:
    """Begin a pass over a layer's own buffers."""
    buffers = Arena(layer.buffer_shapes(), workspace.dtype)
    workspace.start(training_rng, buffers, buffers.like())


def output(layer: Layer, params: Arena, x: Array) -> Array:
    workspace = Workspace("float64")
    begin_training(layer, workspace)
    return layer.forward(params, x, workspace)[0]


@pytest.mark.parametrize(("name", "shape"), PAIRS, ids=str)
def test_the_gradient_agrees_with_central_differences(name: str, shape: Shape) -> None:
    layer, random = LAYERS[name](shape[1]), np.random.default_rng(7)
    x, params = away_from_zero(random, shape), Arena(layer.parameter_shapes(), "float64")
    workspace = Workspace("float64")
    for _ in range(4):
        params.flat[:] = random.normal(size=params.flat.shape)
        grads = params.like()
        grads.flat.fill(np.nan)  # what a gradient arena held before must not matter
        begin_training(layer, workspace)
        y, backward = layer.forward(params, x, workspace)
        dy = random.normal(size=y.shape)
        dx = backward(dy.copy(), grads)
        assert dx is not None
        for array, gradient in [(x, dx), *((params[path], grads[path]) for path in params)]:
            direction, middle = random.normal(size=array.shape), array.copy()
            array[...] = middle + H * direction
            above = (output(layer, params, x) * dy).sum()
            array[...] = middle - H * direction
            below = (output(layer, params, x) * dy).sum()
            array[...] = middle
            assert (gradient * direction).sum() == pytest.approx(
                (above - below) / (2 * H), rel=1e-6, abs=1e-8
            )


@pytest.mark.parametrize("name", LAYERS)
def test_input_and_parameters_are_left_as_they_were(name: str) -> None:
    layer, random = LAYERS[name](4), np.random.default_rng(0)
    x, params = random.normal(size=(6, 4)), Arena(layer.parameter_shapes(), "float64")
    params.flat[:] = random.normal(size=params.flat.shape)
    before = x.copy(), params.flat.copy()
    workspace = Workspace("float64")
    begin_training(layer, workspace)
    y, backward = layer.forward(params, x, workspace)
    backward(np.ones_like(y), params.like())
    assert np.array_equal(x, before[0])
    assert np.array_equal(params.flat, before[1])


FUNCTIONS: dict[str, tuple[Layer, Callable[[float], float]]] = {
    "relu": (ReLU(), lambda z: z if z > 0 else 0.0),
    "leaky_relu": (LeakyReLU(slope=0.2), lambda z: z if z > 0 else 0.2 * z),
    "tanh": (Tanh(), lambda z: (math.exp(2 * z) - 1) / (math.exp(2 * z) + 1)),
    "sigmoid": (Sigmoid(), lambda z: 1 / (1 + math.exp(-z))),
    "gelu": (
        GELU(),
        lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_are_the_functions_they_are_named_after(name: str) -> None:
    layer, function = FUNCTIONS[name]
    x = np.linspace(-6, 6, 97).reshape(1, -1)
    expected = [function(z) for z in x[0]]
    np.testing.assert_allclose(
        output(layer, Arena({}, "float64"), x)[0], expected, rtol=1e-10, atol=1e-15
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_inputs_stay_finite(name: str) -> None:
    workspace = Workspace("float32")
    workspace.start()
    y, backward = FUNCTIONS[name][0].forward(
        {}, np.array([[-1000, 0, 1000]], np.float32), workspace
    )
    dx = backward(np.ones_like(y), {})
    assert np.isfinite(y).all()
    assert dx is not None
    assert np.isfinite(dx).all()


def test_gelu_is_near_its_exact_form() -> None:
    x = np.linspace(-6, 6, 97).reshape(1, -1)
    exact = [z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in x[0]]
    np.testing.assert_allclose(output(GELU(), Arena({}, "float64"), x)[0], exact, atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "at_zero"), [(ReLU(), 0.0), (LeakyReLU(slope=0.2), 0.2)], ids=["relu", "leaky_relu"]
)
def test_the_gradient_of_a_rectifier_at_zero(layer: Layer, at_zero: float) -> None:
    workspace = Workspace("float64")
    _, backward = layer.forward({}, np.zeros((1, 1)), workspace)
    assert backward(np.ones((1, 1)), {}) == at_zero


def test_layer_norm_gives_each_row_mean_shift_and_deviation_scale() -> None:
    layer = LayerNorm(name="norm", n_features=50, epsilon=1e-12)
    params = Arena(layer.parameter_shapes(), "float64")
    params["norm/scale"][:], params["norm/shift"][:] = 3, -2
    y = output(layer, params, np.random.default_rng(0).normal(5, 7, (4, 50)))
    np.testing.assert_allclose(y.mean(axis=1), -2)
    np.testing.assert_allclose(y.std(axis=1), 3)


def test_dense_without_input_gradient_returns_none_and_the_same_parameter_gradients() -> None:
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(5, 4)), random.normal(size=(5, 3))
    found = {}
    for wanted in (True, False):
        layer = Dense(name="dense", n_in=4, n_out=3, input_gradient=wanted)
        params, workspace = Arena(layer.parameter_shapes(), "float64"), Workspace("float64")
        found[wanted] = params.like()
        dx = layer.forward(params, x, workspace)[1](dy, found[wanted])
        assert (dx is not None) == wanted
    assert found[True].same_bits(found[False])
    assert found[False].flat.any()


def test_dense_starts_with_the_deviation_that_its_gain_asks_for() -> None:
    layer = Dense(name="dense", n_in=400, n_out=500, gain=2.0)
    params = Arena(layer.parameter_shapes(), "float64")
    params.flat.fill(9)
    layer.initialize(params, lambda name: rng(0, name))
    # 200,000 values: the standard error of their deviation is 0.16%
    assert params["dense/weight"].std() == pytest.approx(math.sqrt(2 / 400), rel=0.01)
    assert not params["dense/bias"].any()


class Masks(Model):
    """Two dropout layers over the same input; remembers which elements each pass dropped."""

    def __init__(self) -> None:
        self.dropouts = [Dropout(name="first", rate=0.5), Dropout(name="second", rate=0.5)]
        self.seen: list[bytes] = []

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"unused": (1,)}

    def initialize(self, params: Arena, rng: Any) -> None:
        return

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Any]:
        outputs = [dropout.forward(params, x, workspace)[0] for dropout in self.dropouts]
        self.seen += [(y == 0).tobytes() for y in outputs]
        return outputs[0], lambda dy, grads: grads.flat.fill(0)


def task_of(model: Model, *, n_outputs: int, seed: int = 0, shards: int = 1) -> Regression:
    task = Regression(seed=seed, dtype="float64", shards=shards)
    optimizer, shapes = SGD(learning_rate=Constant(value=0.1)), ModelShapes((20,), n_outputs)
    learner = Learner(MODEL, model, optimizer, shapes, seed=seed, dtype="float64", threads=1)
    task.attach({MODEL: learner}, SINGLE_PROCESS)
    return task


def masks(seed: int, steps: range, shards: int) -> list[bytes]:
    """Return the masks that a training from ones draws: two for each (step, shard)."""
    model, batch = Masks(), Batch(np.ones((32, 20)), np.zeros((32, 20)))
    task = task_of(model, n_outputs=20, seed=seed, shards=shards)
    for step in steps:
        task.step(task.initial_state(step), batch)
    return model.seen


def test_a_mask_is_a_function_of_seed_layer_step_and_shard() -> None:
    assert masks(0, range(5), 4) == masks(0, range(5), 4)
    assert (
        masks(0, range(3, 4), 4) == masks(0, range(5), 4)[3 * 8 : 4 * 8]
    )  # step 3 needs no step before it
    drawn = [*masks(0, range(5), 4), *masks(1, range(5), 4)]
    assert len(set(drawn)) == len(drawn) == 2 * 5 * 4 * 2


def test_dropout_passes_everything_unchanged_in_evaluation() -> None:
    model = Masks()
    task = task_of(model, n_outputs=3)
    batch = Batch(np.full((8, 3), 2.0), np.zeros((8, 3)))
    assert task.evaluate(task.initial_state(0), [batch]) == {"loss": 4.0}
    assert model.seen == [bytes(24)] * 2


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_rate_and_preserves_the_mean(rate: float) -> None:
    x = np.ones((500, 200))
    y = output(Dropout(name="dropout", rate=rate), Arena({}, "float64"), x)
    assert set(np.unique(y)) == {0.0, 1 / (1 - rate)}
    five_errors = 5 * math.sqrt(rate / (1 - rate) / x.size)
    assert abs(y.mean() - 1) < five_errors


def test_every_layer_is_in_the_table() -> None:
    files = {path.stem for path in Path(layers.__path__[0]).glob("*.py")} - {
        "__init__",
        "base",
        "elementary",
    }
    assert files == {type(make(1)).__module__.rpartition(".")[2] for make in LAYERS.values()}


def relative_errors(found: Array, expected: Array) -> Array:
    """Return |found - expected| / |expected|, but 0 where the dtype has no normal number for what is expected."""
    smallest = np.finfo(found.dtype).tiny
    errors = np.abs(found.astype(np.longdouble) - expected) / np.maximum(np.abs(expected), smallest)
    return np.asarray(errors, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sigmoid_and_its_derivatives_keep_their_relative_precision_in_both_tails(
    dtype: str,
) -> None:
    end = -np.log(float(np.finfo(dtype).tiny)) - 1
    x = np.linspace(-end, end, 4001).astype(dtype).reshape(1, -1)
    exact = x.astype(np.longdouble)
    decay = np.exp(-np.abs(exact))
    tail = decay / (1 + decay)
    expected = np.where(exact < 0, tail, 1 / (1 + decay))
    slope = tail / (1 + decay)
    layer, workspace = Sigmoid(), Workspace(dtype)
    workspace.start()
    y, backward = layer.forward({}, x, workspace)
    second_derivative = layer.second_derivative(x, y)
    dx = backward(np.ones_like(y), {})
    assert dx is not None
    tolerance = 8 * np.finfo(dtype).eps
    assert relative_errors(y, expected).max() < tolerance
    assert relative_errors(dx, slope).max() < tolerance
    away = np.abs(x) > 0.01
    bend = np.copysign(slope * (1 - 2 * tail), -exact)
    assert relative_errors(second_derivative[away], bend[away]).max() < 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_keeps_its_relative_precision_in_its_tail(dtype: str) -> None:
    x = np.linspace(-7, 7, 2001).astype(dtype).reshape(1, -1)
    exact = x.astype(np.longdouble)
    scale, cubic = 2 * np.sqrt(2 / np.longdouble(np.pi)), np.longdouble(0.044715)
    gate = 1 / (1 + np.exp(-scale * (exact + cubic * exact**3)))
    slope = gate + exact * gate * (1 - gate) * scale * (1 + 3 * cubic * exact**2)
    workspace = Workspace(dtype)
    workspace.start()
    y, backward = GELU().forward({}, x, workspace)
    dx = backward(np.ones_like(y), {})
    assert dx is not None
    # the argument of exp is as far as 40 from 0, and its error is relative
    tolerance = 100 * np.finfo(dtype).eps
    assert relative_errors(y, exact * gate).max() < tolerance
    away = np.abs(exact + 0.75) > 0.1  # from where the slope is 0
    assert relative_errors(dx[away], slope[away]).max() < 4 * tolerance


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("slope", [0.01, 0.0, -0.2, 0.9])
def test_the_gradient_of_a_leaky_relu_is_dy_or_slope_dy_to_the_bit(
    slope: float, dtype: str
) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 33)).astype(dtype)
    dy = random.standard_normal((64, 33)).astype(dtype)
    x[0, :4] = [0.0, -0.0, np.inf, -np.inf]
    dy[1:9, :2] = [0.0, -0.0]
    expected = np.where(x > 0, dy, np.multiply(dy, slope))
    with np.errstate(invalid="ignore"):
        _, backward = LeakyReLU(slope=slope).forward({}, x, Workspace(dtype))
    dx = backward(dy.copy(), {})
    assert dx is not None
    assert same_bits(dx, expected)
