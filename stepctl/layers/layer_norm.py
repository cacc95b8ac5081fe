"""y = scale (x - mean) / sqrt(variance + epsilon) + shift, over the features of each row."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.arena import Array, Workspace
from stepctl.layers.base import Backward, Norm


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """Layer normalisation (Ba et al. 2016, equation 3): x (rows, n_features) -> the same shape."""

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        scale = params[f"{self.name}/scale"]
        normal, y = workspace.empty(x.shape), workspace.empty(x.shape)
        mean, root = workspace.empty((len(x), 1)), workspace.empty((len(x), 1))
        np.mean(x, axis=1, keepdims=True, out=mean)
        np.subtract(x, mean, out=normal)
        np.multiply(normal, normal, out=y)
        np.mean(y, axis=1, keepdims=True, out=root)
        np.add(root, self.epsilon, out=root)
        np.sqrt(root, out=root)
        np.divide(normal, root, out=normal)
        np.multiply(normal, scale, out=y)
        np.add(y, params[f"{self.name}/shift"], out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            # dx = (dn - mean(dn) - n mean(dn n)) / root, with dn = dy scale and n the normalised input
            dx, product = workspace.empty(x.shape), workspace.empty(x.shape)
            np.multiply(dy, normal, out=product)
            np.add.reduce(product, axis=0, out=grads[f"{self.name}/scale"])
            np.add.reduce(dy, axis=0, out=grads[f"{self.name}/shift"])
            np.multiply(dy, scale, out=dx)
            np.multiply(dx, normal, out=product)
            np.mean(product, axis=1, keepdims=True, out=mean)
            np.multiply(normal, mean, out=product)
            np.mean(dx, axis=1, keepdims=True, out=mean)
            np.subtract(dx, mean, out=dx)
            np.subtract(dx, product, out=dx)
            np.divide(dx, root, out=dx)
            return dx

        return y, backward
