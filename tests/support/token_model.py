"""Models of integer inputs, and data sources of ids in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stepctl.data.base import Sources, Targets
from stepctl.data.memory import InMemory
from stepctl.models.base import Backward, Model
from stepctl.models.loss_model import LossModel
from stepctl.models.trees import Tree
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.rng import NamedGenerators
from stepctl.state.workspace import Workspace

SIZE = 7
FIRST_ID = 33554433  # the first two ids are equal in float32


class Embedding(Model):
    """The sum over a row's ids of table[id % SIZE]; the ids stay integers."""

    integer_inputs = True

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        self.n_outputs = n_outputs

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"table": (SIZE, self.n_outputs)}

    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        params["table"][:] = rng("table").normal(0, 0.1, (SIZE, self.n_outputs))

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        assert x.dtype.kind in "iu", x.dtype
        ids = x.reshape(len(x), -1) % SIZE

        def backward(dy: Array, grads: Arena) -> None:
            grads["table"].fill(0)
            np.add.at(grads["table"], ids, dy[:, None])

        return params["table"][ids].sum(axis=1), backward


def embedding(*, input_shape: Shape, n_outputs: int) -> Embedding:
    """Build the model in a function that declares what it returns."""
    return Embedding(input_shape=input_shape, n_outputs=n_outputs)


def undeclared(*, input_shape: Shape, n_outputs: int):  # type: ignore[no-untyped-def]
    """Build the model in a function that does not."""
    return Embedding(input_shape=input_shape, n_outputs=n_outputs)


def large_ids(
    *, rows: int = 60, targets: Targets, dtype: str, integer_inputs: bool = False
) -> Sources:
    """Rows of three ids above 2^24, whose neighbours are equal in float32, and their classes."""
    ids = FIRST_ID + np.arange(3 * rows).reshape(rows, 3)
    source = InMemory(
        ids,
        ids[:, 0] % 3,
        origin="ids",
        targets=targets,
        dtype=dtype,
        integer_inputs=integer_inputs,
    )
    return Sources(source)


class Bigram(LossModel):
    """The cross-entropy of the next id, of rows of ids: table[id % SIZE] are its logits.

    Ids are masked at random in training. Without targets the next id is the same one.
    """

    def initial_params(self, rng: NamedGenerators) -> Tree:
        return {"table": rng("table").normal(0, 0.1, (SIZE, SIZE))}

    def loss_and_gradients(
        self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators
    ) -> tuple[Array, Tree]:
        for ids in (x, x if y is None else y):
            assert ids.dtype.kind in "iu", ids.dtype
            assert ids.ndim > 1
        last = (x if y is None else y).reshape(len(x), -1) % SIZE
        ids = x.reshape(len(x), -1) % SIZE
        if rng.training:
            ids = np.where(rng("mask").random(ids.shape) < 0.1, 0, ids)
        p = np.exp(params["table"][ids])
        p /= p.sum(axis=2, keepdims=True)
        row, place = np.indices(ids.shape)
        losses = -np.log(p[row, place, last]).mean(axis=1)
        p[row, place, last] -= 1
        gradient = np.zeros_like(params["table"])
        np.add.at(gradient, ids, p / ids.shape[1])
        return losses, {"table": gradient}


def windows(
    *, rows: int = 100, targets: Targets, dtype: str, integer_inputs: bool = False
) -> Sources:
    """Consecutive windows of a text of ids, x: (rows, 2, 3), and the same one place later, y."""
    text = FIRST_ID + np.random.default_rng(0).integers(0, 50, 6 * rows + 1)
    text += np.arange(len(text)) // 100
    source = InMemory(
        text[:-1].reshape(rows, 2, 3),
        text[1:].reshape(rows, 2, 3),
        origin="windows",
        targets=targets,
        dtype=dtype,
        integer_inputs=integer_inputs,
    )
    return Sources(source)


def windows_alone(*, targets: Targets, dtype: str, integer_inputs: bool = False) -> Sources:
    """The windows as 8-bit ids, without the targets."""
    text = np.random.default_rng(0).integers(0, 50, (100, 2, 3), np.uint8)
    source = InMemory(
        text, origin="windows", targets=targets, dtype=dtype, integer_inputs=integer_inputs
    )
    return Sources(source)
