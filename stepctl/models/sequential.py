"""A model made of layers."""

import math
from collections.abc import Callable
from typing import final

import numpy as np

from stepctl.errors import ConfigError
from stepctl.models.base import Backward, Model, TangentBackward
from stepctl.models.layers.base import Layer
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.workspace import Workspace


def flat_size(name: str, input_shape: Shape) -> int:
    """Return the number of features of a sample; ConfigError if it is a single number."""
    if not input_shape:
        raise ConfigError(
            f"{name} needs x of shape (rows, features, ...), but it has (rows,); save it as "
            "x[:, None]"
        )
    return math.prod(input_shape)


@final
class Sequential(Model):
    """Layers that are applied one after another.

    x (rows, *input_shape) is flattened to (rows, n_in); y is (rows, n_outputs).
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def parameter_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for layer in self.layers:
            shapes |= layer.parameter_shapes()
        return shapes

    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        for layer in self.layers:
            layer.initialize(params, rng)

    def buffer_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for layer in self.layers:
            shapes |= layer.buffer_shapes()
        return shapes

    def initialize_buffers(self, buffers: Arena) -> None:
        for layer in self.layers:
            layer.initialize_buffers(buffers)

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        y = x.reshape(len(x), -1)
        layer_backwards = []
        for layer in self.layers:
            y, layer_backward = layer.forward(params, y, workspace)
            layer_backwards.append(layer_backward)

        def backward(dy: Array, grads: Arena) -> Array | None:
            dx: Array | None = dy
            for layer_backward in reversed(layer_backwards):
                if dx is not None:
                    dx = layer_backward(dx, grads)
            return dx

        return y, backward

    def tangent(
        self, params: Arena, x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, TangentBackward]:
        y = x.reshape(len(x), -1)
        w = v.reshape(len(v), -1)
        layer_backwards = []
        for layer in self.layers:
            y, w, layer_backward = layer.tangent(params, y, w, workspace)
            layer_backwards.append(layer_backward)

        def backward(dy: Array, dw: Array, grads: Arena) -> None:
            for layer_backward in reversed(layer_backwards):
                dy, dw = layer_backward(dy, dw, grads)

        return y, w, backward
