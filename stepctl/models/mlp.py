"""The multilayer perceptron."""

import math
from typing import Literal

from stepctl.arena import Shape
from stepctl.errors import ConfigError
from stepctl.layers.base import Layer
from stepctl.layers.batch_norm import BatchNorm
from stepctl.layers.dense import Dense
from stepctl.layers.dropout import Dropout
from stepctl.layers.gelu import GELU
from stepctl.layers.layer_norm import LayerNorm
from stepctl.layers.leaky_relu import LeakyReLU
from stepctl.layers.relu import ReLU
from stepctl.layers.sigmoid import Sigmoid
from stepctl.layers.tanh import Tanh
from stepctl.models.sequential import Sequential
from stepctl.registry import Fraction, PositiveInt

_ACTIVATIONS = {"relu": ReLU, "leaky_relu": LeakyReLU, "gelu": GELU, "tanh": Tanh, "sigmoid": Sigmoid}
_RECTIFIERS = ("relu", "leaky_relu", "gelu")


def mlp(
    *,
    hidden: list[PositiveInt],
    activation: Literal["relu", "leaky_relu", "gelu", "tanh", "sigmoid"] = "relu",
    dropout: Fraction = 0.0,
    layer_norm: bool = False,
    batch_norm: bool = False,
    output: Literal["linear", "sigmoid", "tanh"] = "linear",
    input_shape: Shape,
    n_outputs: int,
    input_gradient: bool = False,
) -> Sequential:
    """For each hidden size: dense, a norm if asked for, activation, dropout; then a dense one, through `output`.

    A dense layer before a batch norm has no bias: the norm would take it out again, and its shift is one.
    """
    if layer_norm and batch_norm:
        raise ConfigError("mlp: layer_norm and batch_norm are both true; leave one of them out")
    gain = 2.0 if activation in _RECTIFIERS else 1.0
    layers: list[Layer] = []
    n_in = math.prod(input_shape)
    for i, n_out in enumerate(hidden):
        needed = i > 0 or input_gradient
        sizes = {"n_in": n_in, "n_out": n_out}
        layers.append(Dense(name=f"dense{i}", **sizes, gain=gain, input_gradient=needed, bias=not batch_norm))
        if batch_norm:
            layers.append(BatchNorm(name=f"batch_norm{i}", n_features=n_out))
        if layer_norm:
            layers.append(LayerNorm(name=f"layer_norm{i}", n_features=n_out))
        layers.append(_ACTIVATIONS[activation]())
        if dropout:
            layers.append(Dropout(name=f"dropout{i}", rate=dropout))
        n_in = n_out
    needed = bool(hidden) or input_gradient
    layers.append(Dense(name=f"dense{len(hidden)}", n_in=n_in, n_out=n_outputs, input_gradient=needed))
    if output != "linear":
        layers.append(_ACTIVATIONS[output]())
    return Sequential(layers)
