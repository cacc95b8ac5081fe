"""y = 1 / (1 + exp(-x))."""

from collections.abc import Mapping

import numpy as np

from stepctl.arena import Array, Workspace
from stepctl.layers.base import Backward, Elementwise


class Sigmoid(Elementwise):
    """The logistic function, as (1 + tanh(x / 2)) / 2, which overflows for no x."""

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        y = workspace.empty(x.shape)
        np.multiply(x, 0.5, out=y)
        np.tanh(y, out=y)
        np.add(y, 1, out=y)
        np.multiply(y, 0.5, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            dx = workspace.empty(x.shape)
            np.subtract(1, y, out=dx)
            np.multiply(dx, y, out=dx)
            np.multiply(dx, dy, out=dx)
            return dx

        return y, backward

    def curvature(self, y: Array) -> Array:
        return np.asarray(y * (1 - y) * (1 - 2 * y))
