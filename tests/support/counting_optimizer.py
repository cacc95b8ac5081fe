"""A user's optimizer whose slot counts the updates of every element."""

from dataclasses import dataclass

import numpy as np

from stepctl.optimizers.base import Block, Optimizer, UpdateInfo
from stepctl.state.arena import Array


@dataclass(frozen=True, kw_only=True)
class Counting(Optimizer):
    """Gradient descent that counts."""

    @property
    def slots(self) -> tuple[str, ...]:
        return ("count",)

    def coefficients(self, info: UpdateInfo) -> tuple[float, ...]:
        return (info.learning_rate,)

    def update_block(self, block: Block, *coefficients: Array) -> None:
        np.add(block.slots[0], 1, out=block.new_slots[0])
        np.multiply(block.grads, coefficients[0], out=block.scratch)
        np.subtract(block.params, block.scratch, out=block.new_params)
