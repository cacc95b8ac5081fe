"""The protocol of a layer.

A layer is a description: it holds sizes and names, no arrays. `forward` returns the output and a closure that
carries the gradient back, so that the two halves cannot disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np

from stepctl.arena import Array, Shape, Workspace

# (dy, grads) -> dx: writes the parameters' gradients into the views of `grads`, all of them, and returns the
# gradient of the layer's input; None from a layer that was told that nobody needs it. dy is used up: dx may be dy.
Backward = Callable[[Array, Mapping[str, Array]], Array | None]


class Layer(ABC):
    """One differentiable function with named parameters."""

    def parameter_shapes(self) -> dict[str, Shape]:
        """Return the shape of each parameter by its name in the model's arena."""
        return {}

    def initialize(self, params: Mapping[str, Array], rng: Callable[[str], np.random.Generator]) -> None:
        """Fill this layer's parameters; `rng(name)` is the generator for one of them."""
        return

    @abstractmethod
    def forward(self, params: Mapping[str, Array], x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        """Return y: (rows, features) and its backward. Arrays come from the workspace; x is not changed."""
