"""Adagrad (Duchi et al. 2011)."""

from dataclasses import dataclass

import numpy as np

from stepctl.optimizers.base import Block, Optimizer, Tick
from stepctl.registry import Positive


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """a <- a + g^2; p <- p - lr g / (sqrt(a) + epsilon)."""

    epsilon: Positive = 1e-10

    @property
    def slots(self) -> tuple[str, ...]:
        return ("accumulator",)

    def update_block(self, block: Block, tick: Tick) -> None:
        (accumulator,), (new_accumulator,) = block.slots, block.new_slots
        g, scratch = block.grads, block.scratch
        np.multiply(g, g, out=scratch)
        np.add(accumulator, scratch, out=new_accumulator)
        np.sqrt(new_accumulator, out=scratch)
        np.add(scratch, self.epsilon, out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, tick.learning_rate, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)
