"""y = tanh(x)."""

from collections.abc import Mapping

import numpy as np

from stepctl.arena import Array, Workspace
from stepctl.layers.base import Backward, Elementwise


class Tanh(Elementwise):
    """The hyperbolic tangent."""

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        y = workspace.empty(x.shape)
        np.tanh(x, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            dx = workspace.empty(x.shape)
            np.multiply(y, y, out=dx)
            np.subtract(1, dx, out=dx)
            np.multiply(dx, dy, out=dx)
            return dx

        return y, backward

    def curvature(self, x: Array, y: Array) -> Array:
        return np.asarray(-2 * y * (1 - y * y))
