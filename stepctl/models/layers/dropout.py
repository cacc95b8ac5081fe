"""y = x mask / (1 - rate), with a random mask of zeros and ones."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.models.layers.base import Layer, LayerBackward
from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Dropout(Layer):
    """Inverted dropout (Srivastava et al. 2014): each element is dropped with probability `rate`.

    The mask is a function of (seed, model name, layer name, step, shard). In evaluation y = x.
    """

    name: str
    rate: float

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        if workspace.rng is None or self.rate == 0:
            return x, lambda dy, grads: dy
        y = workspace.empty(x.shape)
        mask = workspace.empty(x.shape)
        workspace.rng(self.name).random(out=mask, dtype=mask.dtype.type)
        np.greater_equal(mask, self.rate, out=mask)
        np.multiply(mask, 1 / (1 - self.rate), out=mask)
        np.multiply(x, mask, out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            np.multiply(dy, mask, out=dy)
            return dy

        return y, backward
