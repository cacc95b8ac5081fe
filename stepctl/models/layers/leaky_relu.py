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
            # the derivative is 1 p + slope (1 - p), where p is 1 if x > 0, else 0: several times as
            # fast as a copy of dy where x > 0, with the same bits
            positive = workspace.empty(x.shape)
            np.greater(x, 0, out=positive)
            derivative = workspace.empty(x.shape)
            np.subtract(1, positive, out=derivative)
            np.multiply(derivative, self.slope, out=derivative)
            np.add(derivative, positive, out=derivative)
            np.multiply(dy, derivative, out=derivative)
            return derivative

        return y, backward
