"""The protocol of a model. A model of your own subclasses Model and is named "package.module:Class"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stepctl.arena import Arena, Array, Shape, Workspace
from stepctl.errors import ConfigError

# (doutputs, grads): writes the gradient of every parameter into the views of `grads`, and returns that of the inputs,
# (rows, ...); None will do where the task does not need it (only wgan's critic must).
Backward = Callable[[Array, Arena], Array | None]
# (doutputs, dtangents, grads): the same for the outputs and their tangents together.
TangentBackward = Callable[[Array, Array, Arena], None]


class Ends(NamedTuple):
    """What a model must map to what, and whether the task needs the gradient of its inputs."""

    input_shape: Shape
    n_outputs: int
    input_gradient: bool = False


class Model(ABC):
    """A differentiable function of named parameters; it holds no arrays of its own.

    Its constructor takes keyword arguments: `input_shape` (one sample's shape, a tuple) and `n_outputs` (int)
    come from the data and the task if it asks for them, and `input_gradient` (bool), whether backward must return the
    gradient of the inputs; every other argument comes from the config.
    """

    @abstractmethod
    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the shape of each parameter by its path, such as {"dense0/weight": (64, 10)}."""

    @abstractmethod
    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        """Fill the parameters; `rng(name)` is a generator of its own for each name."""

    def buffer_shapes(self) -> dict[str, Shape]:
        """Return the shape of each array that training changes without a gradient, such as a running mean.

        `forward` finds them in `workspace.buffers[path]`. Where `workspace.new_buffers` is not None, in training, it
        writes there the whole of what each becomes by its rows, one shard of a batch: the mean over the shards is
        what holds after the step. They are in every checkpoint, under /buffers.
        """
        return {}

    def initialize_buffers(self, buffers: Arena) -> None:
        """Fill the buffers; they are zeros before."""
        return

    @abstractmethod
    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        """Map x: (rows, *input_shape) to outputs: (rows, n_outputs), and return the way back.

        `workspace.empty(shape)` gives temporary arrays without allocating; `workspace.rng` is None in
        evaluation, and else gives the generator of this step and shard by a name; for buffers see `buffer_shapes`.
        Nothing else may vary.
        """

    def tangent(self, params: Arena, x: Array, v: Array, workspace: Workspace) -> tuple[Array, Array, TangentBackward]:
        """Map x, and a direction v at each x, to outputs and the derivative along v: both (rows, n_outputs).

        What a gradient penalty needs: the way back differentiates through both. ConfigError if there is none.
        """
        raise ConfigError("model: it has no tangent, which a gradient penalty needs; use weight_clip")
