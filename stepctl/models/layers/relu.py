"""y = max(x, 0)."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from stepctl.models.layers.base import Elementwise, LayerBackward
from stepctl.state.arena import Array, Shape
from stepctl.state.workspace import Workspace


class ReLU(Elementwise):
    """The rectifier (Nair and Hinton 2010); its derivative at 0 is 0."""

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        y = workspace.empty(x.shape)
        # three times as fast with two arrays as with an array and a scalar
        np.maximum(x, _zeros(x.shape, x.dtype), out=y)
        zero = np.zeros((), x.dtype)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            positive = workspace.empty(x.shape, np.bool_)
            np.greater(y, zero, out=positive)
            np.multiply(dy, positive, out=dy)
            return dy

        return y, backward


@lru_cache(maxsize=16)
def _zeros(shape: Shape, dtype: np.dtype[np.generic]) -> Array:
    return np.zeros(shape, dtype)
