"""y = scale (x - mean) / sqrt(variance + epsilon) + shift, over the rows of each feature."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.arena import Array, Shape, Workspace
from stepctl.errors import ConfigError
from stepctl.layers.base import Backward, Norm


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Norm):
    """Batch normalisation (Ioffe and Szegedy 2015, algorithms 1 and 2): x (rows, n_features) -> the same shape.

    In training x is normalised by the mean and the biased variance of its own rows: those of one shard, the fixed
    part of a batch (with one shard, the whole batch), so that it does not matter which process computes it. The
    running mean and variance, that one unbiased, take in `momentum` of each step's new ones, averaged over the
    shards; they normalise in inference. ConfigError for a single row in training, which has no variance.
    """

    momentum: float = 0.1

    def buffer_shapes(self) -> dict[str, Shape]:
        return {f"{self.name}/mean": (self.n_features,), f"{self.name}/variance": (self.n_features,)}

    def initialize_buffers(self, buffers: Mapping[str, Array]) -> None:
        buffers[f"{self.name}/mean"][:] = 0
        buffers[f"{self.name}/variance"][:] = 1

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        scale, training = params[f"{self.name}/scale"], workspace.new_buffers is not None
        normal, y, root = workspace.empty(x.shape), workspace.empty(x.shape), workspace.empty((self.n_features,))
        if training:
            self._measure(x, normal, y, root, workspace)
        else:
            np.subtract(x, workspace.buffers[f"{self.name}/mean"], out=normal)
            root[:] = workspace.buffers[f"{self.name}/variance"]
        np.add(root, self.epsilon, out=root)
        np.sqrt(root, out=root)
        np.divide(normal, root, out=normal)
        np.multiply(normal, scale, out=y)
        np.add(y, params[f"{self.name}/shift"], out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            # dx = scale (dy - mean(dy) - n mean(dy n)) / root, with n the normalised input; in inference the
            # statistics do not depend on x, and the means are not there
            dscale, dshift = grads[f"{self.name}/scale"], grads[f"{self.name}/shift"]
            product, factor = workspace.empty(x.shape), workspace.empty((self.n_features,))
            np.multiply(dy, normal, out=product)
            np.add.reduce(product, axis=0, out=dscale)
            np.add.reduce(dy, axis=0, out=dshift)
            if training:
                np.divide(dscale, len(x), out=factor)
                np.multiply(normal, factor, out=product)
                np.subtract(dy, product, out=dy)
                np.divide(dshift, len(x), out=factor)
                np.subtract(dy, factor, out=dy)
            np.divide(scale, root, out=factor)
            np.multiply(dy, factor, out=dy)
            return dy

        return y, backward

    def _measure(self, x: Array, centred: Array, squares: Array, variance: Array, workspace: Workspace) -> None:
        """Write x - mean, its squares and the biased variance; keep what the running ones become."""
        rows = len(x)
        if rows < 2:
            raise ConfigError(
                f"model: {self.name} needs 2 samples or more in each shard, and there is {rows}; raise data.batch_size "
                "or lower data.shards"
            )
        mean = workspace.empty((self.n_features,))
        np.mean(x, axis=0, out=mean)
        np.subtract(x, mean, out=centred)
        np.multiply(centred, centred, out=squares)
        np.mean(squares, axis=0, out=variance)
        self._keep("mean", mean, 1.0, workspace)
        self._keep("variance", variance, rows / (rows - 1), workspace)

    def _keep(self, what: str, value: Array, correction: float, workspace: Workspace) -> None:
        """Write (1 - momentum) old + momentum new, with new = correction value, as old + momentum (new - old)."""
        assert workspace.new_buffers is not None
        old, new = workspace.buffers[f"{self.name}/{what}"], workspace.new_buffers[f"{self.name}/{what}"]
        np.multiply(value, correction, out=new)
        np.subtract(new, old, out=new)
        np.multiply(new, self.momentum, out=new)
        np.add(new, old, out=new)
