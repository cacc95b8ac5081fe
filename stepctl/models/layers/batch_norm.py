"""y = scale (x - mean) / sqrt(variance + epsilon) + shift, over the rows of each feature."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepctl.errors import ConfigError
from stepctl.models.layers.base import LayerBackward, Norm
from stepctl.state.arena import Array, Shape
from stepctl.state.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Norm):
    """Batch normalisation (Ioffe and Szegedy 2015, algorithms 1 and 2).

    x and y are (rows, n_features). Training uses the mean and the biased variance of the rows of
    one shard, so that the result does not depend on the number of processes. Inference uses the
    buffers: running <- (1 - momentum) running + momentum new, where new is the mean or the unbiased
    variance of a shard, and the results are averaged over the shards. ConfigError for a shard with
    a single row in training: it has no variance.
    """

    momentum: float = 0.1

    def buffer_shapes(self) -> dict[str, Shape]:
        return {
            f"{self.name}/mean": (self.n_features,),
            f"{self.name}/variance": (self.n_features,),
        }

    def initialize_buffers(self, buffers: Mapping[str, Array]) -> None:
        buffers[f"{self.name}/mean"][:] = 0
        buffers[f"{self.name}/variance"][:] = 1

    def forward(
        self, params: Mapping[str, Array], x: Array, workspace: Workspace
    ) -> tuple[Array, LayerBackward]:
        scale = params[f"{self.name}/scale"]
        training = workspace.new_buffers is not None
        normalized = workspace.empty(x.shape)
        y = workspace.empty(x.shape)
        deviation = workspace.empty((self.n_features,))
        if training:
            self._batch_statistics(x, normalized, y, deviation, workspace)
        else:
            np.subtract(x, workspace.buffers[f"{self.name}/mean"], out=normalized)
            deviation[:] = workspace.buffers[f"{self.name}/variance"]
        np.add(deviation, self.epsilon, out=deviation)
        np.sqrt(deviation, out=deviation)
        np.divide(normalized, deviation, out=normalized)
        np.multiply(normalized, scale, out=y)
        np.add(y, params[f"{self.name}/shift"], out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array:
            # dx = scale (dy - mean(dy) - n mean(dy n)) / deviation, where n is the normalized
            # input; in inference the statistics do not depend on x, which removes the means
            dscale = grads[f"{self.name}/scale"]
            dshift = grads[f"{self.name}/shift"]
            product = workspace.empty(x.shape)
            factor = workspace.empty((self.n_features,))
            np.multiply(dy, normalized, out=product)
            np.add.reduce(product, axis=0, out=dscale)
            np.add.reduce(dy, axis=0, out=dshift)
            if training:
                np.divide(dscale, len(x), out=factor)
                np.multiply(normalized, factor, out=product)
                np.subtract(dy, product, out=dy)
                np.divide(dshift, len(x), out=factor)
                np.subtract(dy, factor, out=dy)
            np.divide(scale, deviation, out=factor)
            np.multiply(dy, factor, out=dy)
            return dy

        return y, backward

    def _batch_statistics(
        self, x: Array, centred: Array, squares: Array, variance: Array, workspace: Workspace
    ) -> None:
        """Write x - mean, its squares, the biased variance, and the new buffers."""
        rows = len(x)
        if rows < 2:
            raise ConfigError(
                f"model: {self.name} needs at least 2 samples per shard, got {rows}; increase "
                "data.batch_size or decrease data.shards"
            )
        mean = workspace.empty((self.n_features,))
        np.mean(x, axis=0, out=mean)
        np.subtract(x, mean, out=centred)
        np.multiply(centred, centred, out=squares)
        np.mean(squares, axis=0, out=variance)
        self._update_buffer(f"{self.name}/mean", mean, 1.0, workspace)
        self._update_buffer(f"{self.name}/variance", variance, rows / (rows - 1), workspace)

    def _update_buffer(
        self, path: str, value: Array, correction: float, workspace: Workspace
    ) -> None:
        """Write old + momentum (correction value - old) into the new buffer."""
        assert workspace.new_buffers is not None
        old = workspace.buffers[path]
        new = workspace.new_buffers[path]
        np.multiply(value, correction, out=new)
        np.subtract(new, old, out=new)
        np.multiply(new, self.momentum, out=new)
        np.add(new, old, out=new)
