"""RMSProp (Tieleman and Hinton 2012, lecture 6.5)."""

from dataclasses import dataclass

import numpy as np

from stepctl.optimizers.base import Block, Optimizer, Tick
from stepctl.registry import Fraction, Positive


@dataclass(frozen=True, kw_only=True)
class RMSProp(Optimizer):
    """s <- decay s + (1 - decay) g^2; p <- p - lr g / (sqrt(s) + epsilon)."""

    decay_rate: Fraction = 0.9
    epsilon: Positive = 1e-8

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mean_square",)

    def update_block(self, block: Block, tick: Tick) -> None:
        (mean_square,), (new_mean_square,) = block.slots, block.new_slots
        g, scratch = block.grads, block.scratch
        np.multiply(g, g, out=scratch)
        np.multiply(scratch, 1 - self.decay_rate, out=scratch)
        np.multiply(mean_square, self.decay_rate, out=new_mean_square)
        np.add(new_mean_square, scratch, out=new_mean_square)
        np.sqrt(new_mean_square, out=scratch)
        np.add(scratch, self.epsilon, out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, tick.learning_rate, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)
