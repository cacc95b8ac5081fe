"""Models that give their loss; configs name them by their import path. `ByHand` needs no autograd."""

from __future__ import annotations

import math
from typing import Any

import autograd.numpy as np
import numpy

from stepctl.models.loss_model import LossModel
from stepctl.models.trees import Tree
from stepctl.state.arena import Array, Shape
from stepctl.state.rng import NamedGenerators
from tests.support.loss_by_hand import ByHand

__all__ = ["ByHand"]


class Softmax(LossModel):
    """Cross-entropy of a tanh layer and a linear one, with noise on the hidden units in training."""

    def __init__(
        self, *, width: int = 8, noise: float = 0.1, decay: float = 1e-3, input_shape: Shape
    ) -> None:
        self.n_in = math.prod(input_shape)
        self.width = width
        self.noise = noise
        self.decay = decay

    def initial_params(self, rng: NamedGenerators) -> Tree:
        draw = rng("weights").normal
        return {
            "layers": [
                (draw(0, self.n_in**-0.5, (self.n_in, self.width)), np.zeros(self.width)),
                (draw(0, self.width**-0.5, (self.width, 10)), np.zeros(10)),
            ]
        }

    def loss(self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators) -> Array:
        assert y is not None
        hidden = self.hidden(params, x)
        if rng.training:
            noise = rng("noise").standard_normal(hidden.shape, dtype=x.dtype)
            hidden = hidden * (1 + self.noise * noise)
        w, b = params["layers"][1]
        logits = hidden @ w + b
        largest = np.max(logits, axis=1, keepdims=True)
        total = np.log(np.sum(np.exp(logits - largest), axis=1)) + largest[:, 0]
        labels = y.reshape(len(y)).astype(int)
        found: Array = total - logits[np.arange(len(y)), labels]
        return found

    def hidden(self, params: Tree, x: Array) -> Any:
        w, b = params["layers"][0]
        return np.tanh(x.reshape(len(x), -1) @ w + b)

    def penalty(self, params: Tree) -> Any:
        return self.decay * sum(np.sum(w**2) for w, _ in params["layers"])

    def predict(self, params: Tree, x: Array) -> Any:
        w, b = params["layers"][1]
        return np.argmax(self.hidden(params, x) @ w + b, axis=1)


class Autoencoder(LossModel):
    """The squared error of a reconstruction through a noisy code; it needs no targets."""

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        assert n_outputs == 0
        (self.n_in,) = input_shape

    def initial_params(self, rng: NamedGenerators) -> Tree:
        return [rng("encoder").normal(0, 0.1, (self.n_in, 4)), {"w": np.zeros((4, self.n_in))}]

    def loss(self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators) -> Array:
        assert y is None
        encoder, decoder = params
        code = x @ encoder
        code = code + rng("code").normal(0, 0.1, code.shape)
        found: Array = np.sum((code @ decoder["w"] - x) ** 2, axis=1)
        return found


class Pairs(LossModel):
    """The probability of a label after two token ids, which reach the loss as they are in the file."""

    def initial_params(self, rng: NamedGenerators) -> Tree:
        return {"table": rng("table").normal(0, 0.1, (3, 3, 4))}

    def loss(self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators) -> Array:
        assert y is not None
        assert (x.dtype, y.dtype) == (np.int64, np.uint16)
        first, second = (x - FIRST_ID).T
        logits = params["table"][first, second]
        found: Array = np.log(np.sum(np.exp(logits), axis=1)) - logits[np.arange(len(y)), y]
        return found


FIRST_ID = 33554432  # float32 cannot tell it from the next id


class NoLoss(LossModel):
    """A model whose loss is missing."""

    def initial_params(self, rng: NamedGenerators) -> Tree:
        return {"w": np.zeros(3)}


SHARED = numpy.zeros((2, 3))
INITIAL: dict[str, Any] = {  # what `initial_params` may wrongly return
    "an array": np.zeros(3),
    "none": None,
    "nothing": {},
    "an empty list": {"w": np.zeros(3), "layers": []},
    "a slash": {"a": {"b/c": np.zeros(3)}},
    "no text": {"a": {1: np.zeros(3)}},
    "a line end": {"the\nlayers": []},
    "an empty key": {"a": {"": np.zeros(3)}},
    "a space": {"the weight": np.zeros(3)},
    "integers": [np.zeros(3), np.zeros(3, int)],
    "complex numbers": {"w": np.zeros(3, complex)},
    "a number": {"scale": 1.0},
    "no elements": {"w": np.zeros((0, 3))},
    "one array twice": {"w": SHARED, "v": SHARED},
    "a view": {"w": SHARED, "v": (np.zeros(3), SHARED[1])},
    "an endless nesting": [],
    "not finite": {"w": np.array([0.0, math.nan, 0.0]), "b": np.zeros(())},
    "too large for float32": {"w": np.full(3, 1e300), "b": np.zeros(())},
}
INITIAL["an endless nesting"].append(INITIAL["an endless nesting"])


class Broken(LossModel):
    """A model with one mistake."""

    def __init__(self, *, wrong: str, input_shape: Shape) -> None:
        self.wrong = wrong
        self.n_in = math.prod(input_shape)
        self.calls = 0

    def initial_params(self, rng: NamedGenerators) -> Tree:
        if self.wrong in INITIAL:
            return INITIAL[self.wrong]
        if self.wrong == "an attribute of rng":
            return {"w": rng.normal(0, 1, self.n_in)}
        self.calls += 1
        if self.wrong == "other shapes":
            return {"w": np.zeros(self.n_in + self.calls)}
        return {"w": np.full(self.n_in, 0.1), "b": np.zeros(())}

    def loss(self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators) -> Any:
        losses = (x.reshape(len(x), -1) @ params["w"] + params["b"]) ** 2
        return LOSSES.get(self.wrong, lambda losses: losses)(losses)


def assign(losses: Any) -> Any:
    found = numpy.zeros(len(losses))
    found[0] = losses[0]
    return found


def assign_to_traced(losses: Any) -> Any:
    losses[0] = 0
    return losses


def fail(losses: Any) -> Any:
    raise RuntimeError("the model has a bug")


LOSSES: dict[str, Any] = {  # how `loss` may be wrong
    "the mean": np.mean,
    "a column": lambda losses: losses[:, None],
    "complex losses": lambda losses: losses + 1j,
    "no value": lambda losses: None,
    "numpy's function": lambda losses: numpy.dot(numpy.eye(len(losses)), losses),
    "a constant": lambda losses: numpy.ones(len(losses)),
    "an assignment": assign,
    "an assignment to a traced array": assign_to_traced,
    "no derivative": np.spacing,
    "infinite": lambda losses: losses / 0.0,
    "an error": fail,
}


class BrokenPenalty(Broken):
    """A model whose penalty is wrong."""

    def penalty(self, params: Tree) -> Any:
        if self.wrong == "an array of penalties":
            return params["w"] ** 2
        if self.wrong == "a whole number":
            return 1
        if self.wrong == "no penalty":
            return None
        return np.sum(params["w"] ** 2) * math.inf
