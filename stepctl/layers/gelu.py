"""y = x Phi(x), approximated with tanh."""

import math
from collections.abc import Mapping

import numpy as np

from stepctl.arena import Array, Workspace
from stepctl.layers.base import Backward, Layer

_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


class GELU(Layer):
    """The Gaussian error linear unit in its tanh form (Hendrycks and Gimpel 2016, section 2)."""

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        y, t, square = (workspace.empty(x.shape) for _ in range(3))
        np.multiply(x, x, out=square)
        np.multiply(square, _ROOT * _CUBIC, out=t)
        np.add(t, _ROOT, out=t)
        np.multiply(t, x, out=t)
        np.tanh(t, out=t)
        np.add(t, 1, out=y)
        np.multiply(y, x, out=y)
        np.multiply(y, 0.5, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            # dy/dx = (1 + t) / 2 + x (1 - t^2) u' / 2, with u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
            dx, slope = workspace.empty(x.shape), workspace.empty(x.shape)
            np.multiply(square, 3 * _CUBIC * _ROOT, out=slope)
            np.add(slope, _ROOT, out=slope)
            np.multiply(slope, x, out=slope)
            np.multiply(t, t, out=dx)
            np.subtract(1, dx, out=dx)
            np.multiply(dx, slope, out=dx)
            np.add(dx, t, out=dx)
            np.add(dx, 1, out=dx)
            np.multiply(dx, dy, out=dx)
            np.multiply(dx, 0.5, out=dx)
            return dx

        return y, backward
