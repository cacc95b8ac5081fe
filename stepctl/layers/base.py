"""The protocol of a layer.

A layer is a description: it holds sizes and names, no arrays. `forward` returns the output and a closure that
carries the gradient back, so that the two halves cannot disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.arena import Array, Shape, Workspace
from stepctl.errors import ConfigError

# (dy, grads) -> dx: writes the parameters' gradients into the views of `grads`, all of them, and returns the
# gradient of the layer's input; None from a layer that was told that nobody needs it. dy is used up: dx may be dy.
Backward = Callable[[Array, Mapping[str, Array]], Array | None]
# (dy, dw, grads) -> (dx, dv): the same for an output y and its tangent w together.
TangentBackward = Callable[[Array, Array, Mapping[str, Array]], tuple[Array, Array]]


class Layer(ABC):
    """One differentiable function with named parameters."""

    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the shape of each parameter by its name in the model's arena."""
        return {}

    def initialize(self, params: Mapping[str, Array], rng: Callable[[str], np.random.Generator]) -> None:
        """Fill this layer's parameters; `rng(name)` is the generator for one of them."""
        return

    def buffer_shapes(self) -> dict[str, Shape]:
        """Return the shape of each non-trainable array by its name in the model's buffers."""
        return {}

    def initialize_buffers(self, buffers: Mapping[str, Array]) -> None:
        """Fill this layer's buffers; they are zeros before."""
        return

    @abstractmethod
    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        """Return y: (rows, features) and its backward. Arrays come from the workspace; x is not changed.

        A layer with buffers finds them in `workspace.buffers`, and writes new ones as `Workspace` says.
        """

    def tangent(
        self, params: Mapping[str, Array], x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, TangentBackward]:
        """Return y, its derivative w along v (the Jacobian's product), and the backward of both."""
        raise ConfigError(f"model: {type(self).__name__} has no tangent, which a gradient penalty needs")


class Elementwise(Layer):
    """y = f(x), each element by itself: what carries a gradient back, the product with f'(x), carries a tangent on."""

    def curvature(self, x: Array, y: Array) -> Array | None:
        """Return f''(x), where y = f(x); None if it is 0 almost everywhere."""
        return None

    def tangent(
        self, params: Mapping[str, Array], x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, TangentBackward]:
        y, back = self.forward(params, x, workspace)
        w = self._through(back, _copy(v, workspace))

        def backward(dy: Array, dw: Array, grads: Mapping[str, Array]) -> tuple[Array, Array]:
            dx = self._through(back, dy)
            if (curvature := self.curvature(x, y)) is not None:
                np.add(dx, curvature * v * dw, out=dx)
            return dx, self._through(back, dw)

        return y, w, backward

    @staticmethod
    def _through(back: Backward, array: Array) -> Array:
        carried = back(array, {})
        assert carried is not None
        return carried


@dataclass(frozen=True, kw_only=True)
class Norm(Layer):
    """A layer that normalises, and then scales and shifts each feature."""

    name: str
    n_features: int
    epsilon: float = 1e-5

    def parameter_shapes(self) -> dict[str, Shape]:
        return {f"{self.name}/scale": (self.n_features,), f"{self.name}/shift": (self.n_features,)}

    def initialize(self, params: Mapping[str, Array], rng: Callable[[str], np.random.Generator]) -> None:
        params[f"{self.name}/scale"][:] = 1
        params[f"{self.name}/shift"][:] = 0


def _copy(array: Array, workspace: Workspace) -> Array:
    copy = workspace.empty(array.shape)
    copy[...] = array
    return copy
