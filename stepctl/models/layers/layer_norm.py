"""y = scale (x - mean) / sqrt(variance + epsilon) + shift, over the features of each row."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.models.layers.base import LayerBackward, Norm
from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """Layer normalisation (Ba et al. 2016, equation 3): x and y are (rows, n_features)."""

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        scale = params[f"{self.name}/scale"]
        normalized = workspace.empty(x.shape)
        y = workspace.empty(x.shape)
        mean = workspace.empty((len(x), 1))
        deviation = workspace.empty((len(x), 1))
        np.mean(x, axis=1, keepdims=True, out=mean)
        np.subtract(x, mean, out=normalized)
        np.multiply(normalized, normalized, out=y)
        np.mean(y, axis=1, keepdims=True, out=deviation)
        np.add(deviation, self.epsilon, out=deviation)
        np.sqrt(deviation, out=deviation)
        np.divide(normalized, deviation, out=normalized)
        np.multiply(normalized, scale, out=y)
        np.add(y, params[f"{self.name}/shift"], out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            # dx = (dn - mean(dn) - n mean(dn n)) / deviation, where n is the normalized input and
            # dn = dy scale
            dx = workspace.empty(x.shape)
            product = workspace.empty(x.shape)
            np.multiply(dy, normalized, out=product)
            np.add.reduce(product, axis=0, out=grads[f"{self.name}/scale"])
            np.add.reduce(dy, axis=0, out=grads[f"{self.name}/shift"])
            np.multiply(dy, scale, out=dx)
            np.multiply(dx, normalized, out=product)
            np.mean(product, axis=1, keepdims=True, out=mean)
            np.multiply(normalized, mean, out=product)
            np.mean(dx, axis=1, keepdims=True, out=mean)
            np.subtract(dx, mean, out=dx)
            np.subtract(dx, product, out=dx)
            np.divide(dx, deviation, out=dx)
            return dx

        return y, backward
