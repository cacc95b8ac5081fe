"""A user's model in plain NumPy with hand-written gradients; configs name it by its import path."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from stepctl.errors import NonFiniteError
from stepctl.models.base import Backward, Model
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.workspace import Workspace


class TwoLayers(Model):
    """tanh(x W + b) V, with noise on the hidden units in training."""

    def __init__(self, *, width: int = 8, input_shape: Shape, n_outputs: int) -> None:
        if width % 2:
            raise ValueError(f"width {width} is odd")
        self.n_in = math.prod(input_shape)
        self.width = width
        self.n_out = n_outputs

    def parameter_shapes(self) -> dict[str, Shape]:
        return {
            "in/W": (self.n_in, self.width),
            "in/b": (self.width,),
            "out/V": (self.width, self.n_out),
        }

    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        params["in/W"][:] = rng("in/W").normal(0, self.n_in**-0.5, (self.n_in, self.width))
        params["in/b"][:] = 0
        params["out/V"][:] = rng("out/V").normal(0, self.width**-0.5, (self.width, self.n_out))

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        hidden = np.tanh(x @ params["in/W"] + params["in/b"])
        noise = np.ones_like(hidden)
        if workspace.rng is not None:
            noise += workspace.rng("noise").normal(0, 0.1, hidden.shape).astype(hidden.dtype)

        def backward(dy: Array, grads: Arena) -> None:
            np.matmul((hidden * noise).T, dy, out=grads["out/V"])
            dz = dy @ params["out/V"].T * noise * (1 - hidden**2)
            np.matmul(x.T, dz, out=grads["in/W"])
            dz.sum(axis=0, out=grads["in/b"])

        return (hidden * noise) @ params["out/V"], backward


class Refuses(TwoLayers):
    """Has an opinion of its own on what can be learnt from."""

    def __init__(self, *, above: float, input_shape: Shape, n_outputs: int) -> None:
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)
        self.above = above

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        if workspace.rng is not None and np.abs(x).max() > self.above:
            raise NonFiniteError("a sample is too large")
        return super().forward(params, x, workspace)


class BeginsWithNaN(TwoLayers):
    """A mistake from the first moment on."""

    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        params["in/W"][:] = np.nan


class ForgetsTheBias(TwoLayers):
    """A mistake that must not go unseen: one gradient is never written."""

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        y, backward = super().forward(params, x, workspace)

        def forgetful(dy: Array, grads: Arena) -> None:
            own = grads.like()
            backward(dy, own)
            for name in ("in/W", "out/V"):
                grads[name][:] = own[name]

        return y, forgetful


class OneOutput(TwoLayers):
    """Another: as many outputs as the user thought right."""

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        super().__init__(input_shape=input_shape, n_outputs=1)


def no_model(*, size: int = 3) -> list[int]:
    """Return something else."""
    return [size]


class TupleOfSizes(TwoLayers):
    """An argument of a type that a config file has no word for."""

    def __init__(
        self, *, sizes: tuple[int, ...] = (4, 2), input_shape: Shape, n_outputs: int
    ) -> None:
        if not isinstance(sizes, tuple):
            raise TypeError("sizes must be a tuple")
        super().__init__(width=sum(sizes), input_shape=input_shape, n_outputs=n_outputs)


class Centred(Model):
    """(x - m) w; m is the mean of the rows in training, else its running mean. It counts steps too."""

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        self.n_in = math.prod(input_shape)
        self.n_out = n_outputs

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"w": (self.n_in, self.n_out)}

    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        return

    def buffer_shapes(self) -> dict[str, Shape]:
        return {"mean": (self.n_in,), "steps": ()}

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        mean = workspace.buffers["mean"]
        if workspace.new_buffers is not None:
            workspace.new_buffers["steps"][...] = workspace.buffers["steps"] + 1
            mean = self.new_mean(x.mean(axis=0), workspace)
        centred = x - mean

        def backward(dy: Array, grads: Arena) -> None:
            np.matmul(centred.T, dy, out=grads["w"])

        return centred @ params["w"], backward

    def new_mean(self, mean: Array, workspace: Workspace) -> Array:
        assert workspace.new_buffers is not None
        workspace.new_buffers["mean"][...] = 0.5 * workspace.buffers["mean"] + 0.5 * mean
        return mean


class ForgetsTheMean(Centred):
    """A mistake that must be detected: a buffer that is not updated."""

    def new_mean(self, mean: Array, workspace: Workspace) -> Array:
        return mean
