"""y = 1 / (1 + exp(-x))."""

from collections.abc import Mapping

import numpy as np

from stepctl.models.layers.base import Elementwise, LayerBackward
from stepctl.models.layers.elementary import sigmoid
from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace


class Sigmoid(Elementwise):
    """The logistic function; y and dy/dx have full relative precision in both tails."""

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        y, tail = sigmoid(x, workspace)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            dx = workspace.empty(x.shape)
            np.subtract(1, tail, out=dx)
            np.multiply(dx, tail, out=dx)
            np.multiply(dx, dy, out=dx)
            return dx

        return y, backward

    def second_derivative(self, x: Array, y: Array) -> Array:
        exponential = np.exp(-np.abs(x))
        tail = exponential / (1 + exponential)
        return np.asarray(np.copysign(tail * (1 - tail) * (1 - 2 * tail), -x))
