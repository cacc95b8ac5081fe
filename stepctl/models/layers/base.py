"""The protocol of a layer.

A layer holds sizes and names, no arrays. `forward` returns the output and a `backward` closure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.errors import ConfigError
from stepctl.state.arena import Array, Shape
from stepctl.state.workspace import Workspace

# (dy, grads) -> dx: writes the gradients of all parameters of the layer into the views of `grads`.
# Returns dx, or None if the layer was built without input_gradient. It may overwrite dy, and dx may
# be dy.
LayerBackward = Callable[[Array, Mapping[str, Array]], Array | None]
# (dy, dw, grads) -> (dx, dv): the same for an output y and its tangent w together.
LayerTangentBackward = Callable[[Array, Array, Mapping[str, Array]], tuple[Array, Array]]


class Layer(ABC):
    """A differentiable function with named parameters."""

    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the shape of each parameter by its path in the model."""
        return {}

    def initialize(
        self, params: Mapping[str, Array], rng: Callable[[str], np.random.Generator]
    ) -> None:
        """Fill the parameters. `rng(path)` returns the generator for one of them."""
        return

    def buffer_shapes(self) -> dict[str, Shape]:
        """Return the shape of each non-trainable array by its path in the model."""
        return {}

    def initialize_buffers(self, buffers: Mapping[str, Array]) -> None:
        """Fill the buffers, which are zeros."""
        return

    @abstractmethod
    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        """Return y and its backward; x and y are (rows, features).

        x is not changed. Temporary arrays and buffers come from the workspace.
        """

    def tangent(
        self, params: Mapping[str, Array], x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, LayerTangentBackward]:
        """Return y, its derivative w along v, and the backward of both."""
        raise ConfigError(
            f"model: {type(self).__name__} does not implement tangent, which a gradient penalty needs; "
            "remove the layer, or use weight_clip"
        )


class Elementwise(Layer):
    """y = f(x), element by element: backward and tangent are both the product with f'(x)."""

    def second_derivative(self, x: Array, y: Array) -> Array | None:
        """Return f''(x), where y = f(x); None if it is 0 almost everywhere."""
        return None

    def tangent(
        self, params: Mapping[str, Array], x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, LayerTangentBackward]:
        y, multiply = self.forward(params, x, workspace)
        w = _multiplied(multiply, _copy(v, workspace))

        def backward(dy: Array, dw: Array, grads: Mapping[str, Array]) -> tuple[Array, Array]:
            dx = _multiplied(multiply, dy)
            second_derivative = self.second_derivative(x, y)
            if second_derivative is not None:
                np.add(dx, second_derivative * v * dw, out=dx)
            return dx, _multiplied(multiply, dw)

        return y, w, backward


@dataclass(frozen=True, kw_only=True)
class Norm(Layer):
    """A normalisation, and then a scale and a shift of each feature; they start as 1 and 0."""

    name: str
    n_features: int
    epsilon: float = 1e-5

    def parameter_shapes(self) -> dict[str, Shape]:
        return {f"{self.name}/scale": (self.n_features,), f"{self.name}/shift": (self.n_features,)}

    def initialize(
        self, params: Mapping[str, Array], rng: Callable[[str], np.random.Generator]
    ) -> None:
        params[f"{self.name}/scale"][:] = 1
        params[f"{self.name}/shift"][:] = 0


def _multiplied(multiply: LayerBackward, array: Array) -> Array:
    """Return the product of an array with f'(x), by an elementwise layer's backward."""
    product = multiply(array, {})
    assert product is not None
    return product


def _copy(array: Array, workspace: Workspace) -> Array:
    copy = workspace.empty(array.shape)
    copy[...] = array
    return copy
