"""y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""

import math
from collections.abc import Mapping

import numpy as np

from stepctl.models.layers.base import Layer, LayerBackward
from stepctl.models.layers.elementary import sigmoid
from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace

SCALE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


class GELU(Layer):
    """The Gaussian error linear unit in its tanh form (Hendrycks and Gimpel 2016, section 2)."""

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), which keeps the precision of small values
        y = workspace.empty(x.shape)
        square = workspace.empty(x.shape)
        argument = workspace.empty(x.shape)
        np.multiply(x, x, out=square)
        np.multiply(square, SCALE * CUBIC, out=argument)
        np.add(argument, SCALE, out=argument)
        np.multiply(argument, x, out=argument)
        gate, tail = sigmoid(argument, workspace)
        np.multiply(gate, x, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            # dy/dx = gate + x gate'
            # gate' = tail (1 - tail) 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
            dx = workspace.empty(x.shape)
            slope = workspace.empty(x.shape)
            np.multiply(square, 3 * CUBIC * SCALE, out=slope)
            np.add(slope, SCALE, out=slope)
            np.multiply(slope, x, out=slope)
            np.subtract(1, tail, out=dx)
            np.multiply(dx, tail, out=dx)
            np.multiply(dx, slope, out=dx)
            np.add(dx, gate, out=dx)
            np.multiply(dx, dy, out=dx)
            return dx

        return y, backward
