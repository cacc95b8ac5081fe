"""The protocol of a model.

A user's model subclasses Model; a config names it "package.module:Class".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np

from stepctl.errors import ConfigError
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.workspace import Workspace

# (dy, grads) -> dx, where y are the outputs: writes the gradient of every parameter into the views
# of `grads`. Returns dx of the shape of x; None is enough unless the task needs it (only wgan's
# critic).
Backward = Callable[[Array, Arena], Array | None]
# (dy, dw, grads): the same for the outputs y and their tangents w together, without dx.
TangentBackward = Callable[[Array, Array, Arena], None]


class ModelShapes(NamedTuple):
    """A task's demands on a model: the shape of one input, and the number of outputs.

    With `input_gradient`, backward must return dx.
    """

    input_shape: Shape
    n_outputs: int
    input_gradient: bool = False


Ends = ModelShapes  # the former name, which a user's task may import


class Model(ABC):
    """A differentiable function of named parameters; it holds no arrays.

    The constructor takes keyword arguments. `input_shape` (a tuple, the shape of one sample),
    `n_outputs` (int) and `input_gradient` (bool, whether backward must return dx) come from the
    data and the task if it has such parameters. All other arguments come from the config.
    """

    # Whether an integer x that is not scaled, such as token ids, keeps its dtype. Otherwise x is
    # converted to the run's dtype.
    integer_inputs: ClassVar[bool] = False

    @abstractmethod
    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the shape of each parameter by its path, such as {"dense0/weight": (64, 10)}."""

    @abstractmethod
    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        """Fill the parameters. `rng(name)` returns an independent generator for each name."""

    def buffer_shapes(self) -> dict[str, Shape]:
        """Return the shape of each buffer by its path.

        Buffers are arrays without a gradient, such as a running mean. `forward` reads
        `workspace.buffers[path]`. In training `workspace.new_buffers` is not None: then `forward`
        writes the complete new values, computed from the rows of one shard. The mean over the
        shards becomes the buffer after the step. Checkpoints hold buffers under /buffers.
        """
        return {}

    def initialize_buffers(self, buffers: Arena) -> None:
        """Fill the buffers, which are zeros."""
        return

    @abstractmethod
    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        """Return the outputs and the backward function.

        x is (rows, *input_shape), the outputs are (rows, n_outputs). `workspace.empty(shape)`
        returns a temporary array, usually without an allocation. `workspace.rng(name)` is a
        generator for this step and shard; `workspace.rng` is None in evaluation. The result must
        depend on nothing else.
        """

    def tangent(
        self, params: Arena, x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, TangentBackward]:
        """Return the outputs, their derivative along v, and the backward function of both.

        x and v are (rows, *input_shape), the outputs and the derivative (rows, n_outputs). Only a
        gradient penalty needs it. ConfigError if the model does not implement it.
        """
        raise ConfigError(
            "model: it does not implement tangent, which a gradient penalty needs; implement it, "
            "or use weight_clip"
        )
