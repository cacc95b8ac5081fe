"""Small trained runs, and their weights as plain NumPy uses them."""

from __future__ import annotations

import gzip
import io
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import stepctl
from stepctl.models.layers.batch_norm import BatchNorm
from stepctl.models.layers.dense import Dense
from stepctl.models.layers.dropout import Dropout
from stepctl.models.layers.gelu import GELU
from stepctl.models.layers.layer_norm import LayerNorm
from stepctl.models.layers.leaky_relu import LeakyReLU
from stepctl.models.layers.relu import ReLU
from stepctl.models.layers.sigmoid import Sigmoid
from stepctl.models.layers.tanh import Tanh
from stepctl.models.sequential import Sequential
from stepctl.models.trees import Tree
from stepctl.state.arena import Array, Shape
from tests.support.loss_by_hand import ByHand
from tests.support.runs import make_config, train

DIGITS: dict[str, Any] = {
    "data": {"name": "digits", "batch_size": 64, "validation_fraction": 0.2},
    "stop": {"last_step": 30},
    "evaluate": {"every": 10},
    "checkpoint": {"every": 10, "keep_last": None},
}
WGAN: dict[str, Any] = {
    "task": {"name": "wgan", "n_critic": 1, "latent": 4, "weight_clip": 0.05},
    "model": {"critic": {"name": "linear"}, "generator": {"name": "linear"}},
    "optimizer": {
        "critic": {"name": "sgd", "learning_rate": 0.01},
        "generator": {"name": "sgd", "learning_rate": 0.01},
    },
}


class Mean(stepctl.Program):
    """A random walk, evaluated by its mean."""

    def initial_state(self, rng: Any) -> dict[str, Any]:
        return {"x": np.zeros(3)}

    def step(self, state: dict[str, Any], step: int, rng: Any) -> Any:
        state["x"] += rng("walk").standard_normal(3)
        return {"first": state["x"][0]}

    def evaluate(self, state: dict[str, Any], rng: Any) -> Any:
        return {"mean": state["x"].mean()}


def train_digits(path: Path, **sections: Any) -> Path:
    """Train a run on the digits for 30 steps, with a checkpoint every 10; return its path."""
    train(make_config(**{**DIGITS, **sections}), path)
    return path


def digits() -> tuple[Array, Array]:
    """Return the pixels, 0 to 16, (1797, 64) uint8, and the labels."""
    packed = resources.files("stepctl.data").joinpath("digits.csv.gz").read_bytes()
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), np.uint8, delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


def mlp_outputs(weights: dict[str, Array], x: Array) -> Array:
    """Return the logits of an mlp with ReLU, computed in float64 from its weights by path."""
    y = x.astype(np.float64)
    n_layers = len([path for path in weights if path.endswith("weight")])
    for number in range(n_layers):
        y = y @ weights[f"dense{number}/weight"].astype(np.float64) + weights[f"dense{number}/bias"]
        if number + 1 < n_layers:
            y = np.maximum(y, 0)
    return y


def softmax(logits: Array) -> Array:
    """Return the probabilities of each row."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def every_layer(*, width: int = 6, input_shape: Shape, n_outputs: int) -> Sequential:
    """A model of all layers of the package."""
    return Sequential(
        [
            Dense(name="first", n_in=math.prod(input_shape), n_out=width, bias=False),
            BatchNorm(name="batch_norm", n_features=width),
            GELU(),
            Dropout(name="dropout", rate=0.3),
            Dense(name="second", n_in=width, n_out=width),
            LayerNorm(name="layer_norm", n_features=width),
            LeakyReLU(slope=0.2),
            Dense(name="third", n_in=width, n_out=width),
            Tanh(),
            Dense(name="fourth", n_in=width, n_out=width),
            ReLU(),
            Dense(name="fifth", n_in=width, n_out=n_outputs),
            Sigmoid(),
        ]
    )


class Predicting(ByHand):
    """A LossModel that predicts."""

    def predict(self, params: Tree, x: Array) -> Array:
        bias, [scale] = params["more"]
        predicted: Array = scale * (x.reshape(len(x), -1) @ params["w"] + bias)
        return predicted
