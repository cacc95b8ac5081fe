"""The protocol of a model. A model of your own subclasses Model and is named "package.module:Class"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from stepctl.arena import Arena, Array, Shape, Workspace

# (doutputs, grads): writes the gradient of every parameter into the views of `grads`.
Backward = Callable[[Array, Arena], None]


class Model(ABC):
    """A differentiable function of named parameters; it holds no arrays of its own.

    Its constructor takes keyword arguments: `input_shape` (one sample's shape, a tuple) and `n_outputs` (int)
    come from the data and the task if it asks for them; every other argument comes from the config.
    """

    @abstractmethod
    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the shape of each parameter by its path, such as {"dense0/weight": (64, 10)}."""

    @abstractmethod
    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        """Fill the parameters; `rng(name)` is a generator of its own for each name."""

    @abstractmethod
    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        """Map x: (rows, *input_shape) to outputs: (rows, n_outputs), and return the way back.

        `workspace.empty(shape)` gives temporary arrays without allocating; `workspace.rng` is None in
        evaluation, and else gives the generator of this step and shard by a name. Nothing else may vary.
        """
