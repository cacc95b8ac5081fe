"""y = tanh(x)."""

from collections.abc import Mapping

import numpy as np

from stepctl.models.layers.base import Elementwise, LayerBackward
from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace


class Tanh(Elementwise):
    """The hyperbolic tangent."""

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        y = workspace.empty(x.shape)
        np.tanh(x, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            dx = workspace.empty(x.shape)
            np.multiply(y, y, out=dx)
            np.subtract(1, dx, out=dx)
            np.multiply(dx, dy, out=dx)
            return dx

        return y, backward

    def second_derivative(self, x: Array, y: Array) -> Array:
        return np.asarray(-2 * y * (1 - y * y))
