"""y = x if x > 0, else slope x."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.models.layers.base import Elementwise, LayerBackward
from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class LeakyReLU(Elementwise):
    """The leaky rectifier (Maas et al. 2013, equation 2); slope < 1 is the derivative at 0."""

    slope: float = 0.01

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        y = workspace.empty(x.shape)
        np.multiply(x, self.slope, out=y)
        np.maximum(x, y, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            dx = workspace.empty(x.shape)
            positive = workspace.empty(x.shape, np.bool_)
            np.greater(x, 0, out=positive)
            np.multiply(dy, self.slope, out=dx)
            np.copyto(dx, dy, where=positive)
            return dx

        return y, backward
