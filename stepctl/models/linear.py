"""Linear and softmax regression."""

import math

from stepctl.arena import Shape
from stepctl.layers.dense import Dense
from stepctl.models.sequential import Sequential


def linear(*, input_shape: Shape, n_outputs: int, input_gradient: bool = False) -> Sequential:
    """One dense layer: linear regression under a squared loss, softmax regression under cross-entropy."""
    n_in = math.prod(input_shape)
    return Sequential([Dense(name="dense0", n_in=n_in, n_out=n_outputs, input_gradient=input_gradient)])
