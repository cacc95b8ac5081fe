"""RMSProp (Tieleman and Hinton 2012, lecture 6.5)."""

from dataclasses import dataclass

import numpy as np

from stepctl.config.registry import Fraction, Positive
from stepctl.optimizers.base import Block, Optimizer, UpdateInfo
from stepctl.state.arena import Array


@dataclass(frozen=True, kw_only=True)
class RMSProp(Optimizer):
    """s <- decay_rate s + (1 - decay_rate) g^2; p <- p - lr g / (sqrt(s) + epsilon).

    Args:
        decay_rate: Decay of the mean square.
        epsilon: Added to the square root, outside of it.
    """

    decay_rate: Fraction = 0.9
    epsilon: Positive = 1e-8

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mean_square",)

    def coefficients(self, info: UpdateInfo) -> tuple[float, ...]:
        return info.learning_rate, self.decay_rate, 1 - self.decay_rate, self.epsilon

    def update_block(self, block: Block, *coefficients: Array) -> None:
        learning_rate, decay_rate, gradient_weight, epsilon = coefficients
        (mean_square,) = block.slots
        (new_mean_square,) = block.new_slots
        g = block.grads
        scratch = block.scratch
        np.multiply(g, g, out=scratch)
        np.multiply(scratch, gradient_weight, out=scratch)
        np.multiply(mean_square, decay_rate, out=new_mean_square)
        np.add(new_mean_square, scratch, out=new_mean_square)
        np.sqrt(new_mean_square, out=scratch)
        np.add(scratch, epsilon, out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, learning_rate, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)
