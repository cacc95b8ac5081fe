"""Stochastic gradient descent, with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013)."""

from dataclasses import dataclass

import numpy as np

from stepctl.arena import Array
from stepctl.optimizers.base import Block, Optimizer, Tick
from stepctl.registry import Fraction


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """v <- momentum v + g; p <- p - lr v, or with `nesterov` p <- p - lr (g + momentum v)."""

    momentum: Fraction = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def coefficients(self, tick: Tick) -> tuple[float, ...]:
        return tick.learning_rate, self.momentum

    def update_block(self, block: Block, *coefficients: Array) -> None:
        learning_rate, momentum = coefficients
        step, scratch = block.grads, block.scratch
        if self.momentum:
            (velocity,), (new_velocity,) = block.slots, block.new_slots
            np.multiply(velocity, momentum, out=new_velocity)
            np.add(new_velocity, block.grads, out=new_velocity)
            step = new_velocity
            if self.nesterov:
                np.multiply(new_velocity, momentum, out=scratch)
                np.add(scratch, block.grads, out=scratch)
                step = scratch
        np.multiply(step, learning_rate, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)
