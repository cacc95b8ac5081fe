"""Adagrad (Duchi et al. 2011)."""

from dataclasses import dataclass

import numpy as np

from stepctl.arena import Array
from stepctl.optimizers.base import Block, Optimizer, Tick
from stepctl.registry import Positive


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """a <- a + g^2; p <- p - lr g / (sqrt(a) + epsilon)."""

    epsilon: Positive = 1e-10

    @property
    def slots(self) -> tuple[str, ...]:
        return ("accumulator",)

    def coefficients(self, tick: Tick) -> tuple[float, ...]:
        return tick.learning_rate, self.epsilon

    def update_block(self, block: Block, *coefficients: Array) -> None:
        learning_rate, epsilon = coefficients
        (accumulator,), (new_accumulator,) = block.slots, block.new_slots
        g, scratch = block.grads, block.scratch
        np.multiply(g, g, out=scratch)
        np.add(accumulator, scratch, out=new_accumulator)
        np.sqrt(new_accumulator, out=scratch)
        np.add(scratch, epsilon, out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, learning_rate, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)
