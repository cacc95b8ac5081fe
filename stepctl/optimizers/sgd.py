"""Stochastic gradient descent (momentum: Polyak 1964; Nesterov: Sutskever et al. 2013)."""

from dataclasses import dataclass

import numpy as np

from stepctl.config.registry import Fraction
from stepctl.optimizers.base import Block, Optimizer, UpdateInfo
from stepctl.state.arena import Array


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """v <- momentum v + g; p <- p - lr v, or with `nesterov` p <- p - lr (g + momentum v).

    Args:
        momentum: Decay of the velocity; 0 is plain gradient descent.
        nesterov: Use Nesterov's momentum.
    """

    momentum: Fraction = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def coefficients(self, info: UpdateInfo) -> tuple[float, ...]:
        return info.learning_rate, self.momentum

    def update_block(self, block: Block, *coefficients: Array) -> None:
        learning_rate, momentum = coefficients
        g = block.grads
        scratch = block.scratch
        direction = g
        if self.momentum:
            (velocity,) = block.slots
            (new_velocity,) = block.new_slots
            np.multiply(velocity, momentum, out=new_velocity)
            np.add(new_velocity, g, out=new_velocity)
            direction = new_velocity
            if self.nesterov:
                np.multiply(new_velocity, momentum, out=scratch)
                np.add(scratch, g, out=scratch)
                direction = scratch
        np.multiply(direction, learning_rate, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)
