"""Models whose gradients are written by hand, which need no autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from stepctl.models.loss_model import LossModel
from stepctl.models.trees import Tree
from stepctl.state.arena import Array, Shape
from stepctl.state.rng import NamedGenerators


class ByHand(LossModel):
    """The squared error of a linear model, with noise on the inputs; or a mistake in its gradients."""

    def __init__(
        self, *, wrong: str = "nothing", noise: float = 0.0, input_shape: Shape, n_outputs: int
    ) -> None:
        self.wrong = wrong
        self.noise = noise
        self.n_in = math.prod(input_shape)
        self.n_out = n_outputs

    def initial_params(self, rng: NamedGenerators) -> Tree:
        return {
            "w": rng("w").normal(0, 1, (self.n_in, self.n_out)),
            "more": (np.zeros(self.n_out), [np.ones(())]),
        }

    def loss_and_gradients(
        self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators
    ) -> Any:
        assert y is not None
        bias, [scale] = params["more"]
        x = x.reshape(len(x), -1)
        if rng.training:
            x = x * (1 + self.noise * rng("noise").standard_normal(x.shape))
        linear = x @ params["w"] + bias
        error = scale * linear - y.reshape(linear.shape)
        losses = (error**2).sum(axis=1)
        gradients = {
            "w": 2 * scale * (x.T @ error),
            "more": (2 * scale * error.sum(axis=0), [2 * (error * linear).sum()]),
        }
        if self.wrong == "a write":
            params["w"] += 1
        if self.wrong == "no gradients":
            return losses
        if self.wrong == "the mean":
            return losses.mean(), gradients
        if self.wrong == "an array of gradients":
            return losses, gradients["w"]
        return losses, gradients | WRONG.get(self.wrong, unchanged)(gradients)


def unchanged(gradients: dict[str, Any]) -> dict[str, Any]:
    return gradients


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a missing gradient": lambda right: {"more": (right["more"][0],)},
    "one too many": lambda right: {"v": right["w"]},
    "an empty gradient": lambda right: {"more": ()},
    "none as a gradient": lambda right: {"w": None},
    "a transposed gradient": lambda right: {"w": right["w"].T},
    "a gradient of integers": lambda right: {"w": right["w"].astype(int)},
    "infinite gradients": lambda right: {"w": right["w"] + math.inf},
}


class Both(ByHand):
    """A model with a loss as well, which evaluations use."""

    def loss(self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators) -> Array:
        return np.full(len(x), 7.0)
