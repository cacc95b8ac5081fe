"""y = x W + b."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stepctl.arena import Array, Shape, Workspace
from stepctl.layers.base import Backward, Layer, TangentBackward


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """A fully connected layer: x (rows, n_in) -> (rows, n_out).

    Weights start normal with standard deviation sqrt(gain / n_in): gain 2 suits relu (He et al. 2015,
    equation 10), gain 1 the others (LeCun et al. 1998, section 4.6). Without `input_gradient`, backward
    returns None and saves a matrix product; without `bias`, b is 0.
    """

    name: str
    n_in: int
    n_out: int
    gain: float = 1.0
    input_gradient: bool = True
    bias: bool = True

    def parameter_shapes(self) -> dict[str, Shape]:
        weight: dict[str, Shape] = {f"{self.name}/weight": (self.n_in, self.n_out)}
        return weight | {f"{self.name}/bias": (self.n_out,)} if self.bias else weight

    def initialize(self, params: Mapping[str, Array], rng: Callable[[str], np.random.Generator]) -> None:
        weight = f"{self.name}/weight"
        params[weight][:] = rng(weight).normal(0, np.sqrt(self.gain / self.n_in), (self.n_in, self.n_out))
        if self.bias:
            params[f"{self.name}/bias"][:] = 0

    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        weight = params[f"{self.name}/weight"]
        y = workspace.empty((len(x), self.n_out))
        np.dot(x, weight, out=y)
        if self.bias:
            np.add(y, params[f"{self.name}/bias"], out=y)

        def backward(dy: Array, grads: Mapping[str, Array]) -> Array | None:
            np.dot(x.T, dy, out=grads[f"{self.name}/weight"])
            if self.bias:  # a sum, at twice add.reduce's speed
                np.dot(_ones(len(dy), dy.dtype), dy, out=grads[f"{self.name}/bias"])
            if not self.input_gradient:
                return None
            dx = workspace.empty(x.shape)
            np.dot(dy, weight.T, out=dx)
            return dx

        return y, backward

    def tangent(
        self, params: Mapping[str, Array], x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, TangentBackward]:
        weight = params[f"{self.name}/weight"]
        y, back = self.forward(params, x, workspace)
        w = workspace.empty(y.shape)
        np.dot(v, weight, out=w)

        def backward(dy: Array, dw: Array, grads: Mapping[str, Array]) -> tuple[Array, Array]:
            dx = back(dy, grads)
            along, dv = workspace.empty(weight.shape), workspace.empty(v.shape)
            np.dot(v.T, dw, out=along)
            np.add(grads[f"{self.name}/weight"], along, out=grads[f"{self.name}/weight"])
            np.dot(dw, weight.T, out=dv)
            return dv if dx is None else dx, dv  # of a first layer nobody asks for dx

        return y, w, backward


@lru_cache(maxsize=8)
def _ones(n: int, dtype: np.dtype[np.generic]) -> Array:
    return np.ones(n, dtype)
