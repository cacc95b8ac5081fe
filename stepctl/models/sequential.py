"""A model made of layers, one after the other."""

from collections.abc import Callable
from typing import final

import numpy as np

from stepctl.arena import Arena, Array, Shape, Workspace
from stepctl.layers.base import Layer
from stepctl.models.base import Backward, Model, TangentBackward


@final
class Sequential(Model):
    """Layers in a row over samples that are flattened first: (rows, *input_shape) -> (rows, n_outputs)."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def parameter_shapes(self) -> dict[str, Shape]:
        return {name: shape for layer in self.layers for name, shape in layer.parameter_shapes().items()}

    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        for layer in self.layers:
            layer.initialize(params, rng)

    def buffer_shapes(self) -> dict[str, Shape]:
        return {name: shape for layer in self.layers for name, shape in layer.buffer_shapes().items()}

    def initialize_buffers(self, buffers: Arena) -> None:
        for layer in self.layers:
            layer.initialize_buffers(buffers)

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        x = x.reshape(len(x), -1)
        backwards = []
        for layer in self.layers:
            x, layer_backward = layer.forward(params, x, workspace)
            backwards.append(layer_backward)

        def backward(dy: Array, grads: Arena) -> Array | None:
            gradient: Array | None = dy
            for layer_backward in reversed(backwards):
                if gradient is not None:
                    gradient = layer_backward(gradient, grads)
            return gradient

        return x, backward

    def tangent(self, params: Arena, x: Array, v: Array, workspace: Workspace) -> tuple[Array, Array, TangentBackward]:
        x, v = x.reshape(len(x), -1), v.reshape(len(v), -1)
        backwards = []
        for layer in self.layers:
            x, v, layer_backward = layer.tangent(params, x, v, workspace)
            backwards.append(layer_backward)

        def backward(dy: Array, dw: Array, grads: Arena) -> None:
            for layer_backward in reversed(backwards):
                dy, dw = layer_backward(dy, dw, grads)

        return x, v, backward
