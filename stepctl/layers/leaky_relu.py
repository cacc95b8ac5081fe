"""y = x where x > 0, slope x elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.arena import Array, Workspace
from stepctl.layers.base import Backward, Elementwise


@dataclass(frozen=True, kw_only=True)
class LeakyReLU(Elementwise):
    """The leaky rectifier (Maas et al. 2013, equation 2); its gradient at 0 is the slope, which is below 1."""

    slope: float = 0.01

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        y = workspace.empty(x.shape)
        np.multiply(x, self.slope, out=y)
        np.maximum(x, y, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            dx, positive = workspace.empty(x.shape), workspace.empty(x.shape, np.bool_)
            np.greater(x, 0, out=positive)
            np.multiply(dy, self.slope, out=dx)
            np.copyto(dx, dy, where=positive)
            return dx

        return y, backward
