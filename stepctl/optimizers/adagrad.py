"""Adagrad (Duchi et al. 2011, figure 1, diagonal)."""

from dataclasses import dataclass

import numpy as np

from stepctl.config.registry import Positive
from stepctl.optimizers.base import Block, Optimizer, UpdateInfo
from stepctl.state.arena import Array


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """a <- a + g^2; p <- p - lr g / (sqrt(a) + epsilon).

    Args:
        epsilon: Added to the square root, outside of it.
    """

    epsilon: Positive = 1e-10

    @property
    def slots(self) -> tuple[str, ...]:
        return ("accumulator",)

    def coefficients(self, info: UpdateInfo) -> tuple[float, ...]:
        return info.learning_rate, self.epsilon

    def update_block(self, block: Block, *coefficients: Array) -> None:
        learning_rate, epsilon = coefficients
        (accumulator,) = block.slots
        (new_accumulator,) = block.new_slots
        g = block.grads
        scratch = block.scratch
        np.multiply(g, g, out=scratch)
        np.add(accumulator, scratch, out=new_accumulator)
        np.sqrt(new_accumulator, out=scratch)
        np.add(scratch, epsilon, out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, learning_rate, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)
