"""The multilayer perceptron."""

from typing import Literal

from stepctl.config.registry import Fraction, PositiveInt
from stepctl.errors import ConfigError
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
from stepctl.models.sequential import Sequential, flat_size
from stepctl.state.arena import Shape

_ACTIVATIONS = {
    "relu": ReLU,
    "leaky_relu": LeakyReLU,
    "gelu": GELU,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
}
_RECTIFIERS = ("relu", "leaky_relu", "gelu")  # initialized with gain 2


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
    """Hidden layers (dense, norm, activation, dropout), a dense layer, the output activation.

    A dense layer before a batch norm has no bias, because the norm's shift replaces it.

    Args:
        hidden: Number of units of each hidden layer.
        activation: Activation of the hidden layers; gelu is the tanh form.
        dropout: Probability with which a hidden unit is dropped during training.
        layer_norm: Add layer normalization before each activation.
        batch_norm: Add batch normalization before each activation.
        output: Activation of the output layer; linear is none.
    """
    if layer_norm and batch_norm:
        raise ConfigError("mlp: layer_norm and batch_norm are both true; use one of them")
    gain = 2.0 if activation in _RECTIFIERS else 1.0
    layers: list[Layer] = []
    n_in = flat_size("mlp", input_shape)
    for i, n_out in enumerate(hidden):
        dense = Dense(
            name=f"dense{i}",
            n_in=n_in,
            n_out=n_out,
            gain=gain,
            input_gradient=input_gradient or i > 0,
            bias=not batch_norm,
        )
        layers.append(dense)
        if batch_norm:
            layers.append(BatchNorm(name=f"batch_norm{i}", n_features=n_out))
        if layer_norm:
            layers.append(LayerNorm(name=f"layer_norm{i}", n_features=n_out))
        layers.append(_ACTIVATIONS[activation]())
        if dropout:
            layers.append(Dropout(name=f"dropout{i}", rate=dropout))
        n_in = n_out
    last = Dense(
        name=f"dense{len(hidden)}",
        n_in=n_in,
        n_out=n_outputs,
        input_gradient=input_gradient or bool(hidden),
    )
    layers.append(last)
    if output != "linear":
        layers.append(_ACTIVATIONS[output]())
    return Sequential(layers)
