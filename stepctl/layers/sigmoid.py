"""y = 1 / (1 + exp(-x))."""

from collections.abc import Mapping

import numpy as np

from stepctl.arena import Array, Workspace
from stepctl.elementary import sigmoid
from stepctl.layers.base import Backward, Elementwise


class Sigmoid(Elementwise):
    """The logistic function; y and dy/dx keep their relative precision in both tails."""

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        y, tail = sigmoid(x, workspace)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            dx = workspace.empty(x.shape)
            np.subtract(1, tail, out=dx)
            np.multiply(dx, tail, out=dx)
            np.multiply(dx, dy, out=dx)
            return dx

        return y, backward

    def curvature(self, x: Array, y: Array) -> Array:
        decay = np.exp(-np.abs(x))
        tail = decay / (1 + decay)
        return np.asarray(np.copysign(tail * (1 - tail) * (1 - 2 * tail), -x))
