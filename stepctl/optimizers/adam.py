"""Adam (Kingma and Ba 2015, algorithm 1) and AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from stepctl.arena import Array
from stepctl.optimizers.base import Block, Optimizer, Tick
from stepctl.registry import Fraction, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class AdaptiveMoments(Optimizer):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; p <- p - lr m' / (sqrt(v') + epsilon).

    m' = m / (1 - b1^t) and v' = v / (1 - b2^t), with t the number of this optimizer's updates.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8

    @property
    def slots(self) -> tuple[str, ...]:
        return ("first_moment", "second_moment")

    def coefficients(self, tick: Tick) -> tuple[float, ...]:
        # both corrections and the rate folded into two numbers: p - step m / (sqrt(v) + epsilon root)
        root = math.sqrt(1 - self.beta2**tick.number)
        step = tick.learning_rate * root / (1 - self.beta1**tick.number)
        return self.beta1, 1 - self.beta1, self.beta2, (1 - self.beta2) / (1 - self.beta1), step, self.epsilon * root

    def update_block(self, block: Block, *coefficients: Array) -> None:
        beta1, share, beta2, ratio, step, epsilon = coefficients
        (m, v), (new_m, new_v) = block.slots, block.new_slots
        g, scratch = block.grads, block.scratch
        np.multiply(m, beta1, out=new_m)
        np.multiply(g, share, out=scratch)
        np.add(new_m, scratch, out=new_m)
        np.multiply(scratch, g, out=scratch)
        np.multiply(scratch, ratio, out=scratch)
        np.multiply(v, beta2, out=new_v)
        np.add(new_v, scratch, out=new_v)
        np.sqrt(new_v, out=scratch)
        np.add(scratch, epsilon, out=scratch)
        np.divide(new_m, scratch, out=scratch)
        np.multiply(scratch, step, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)


@final
@dataclass(frozen=True, kw_only=True)
class Adam(AdaptiveMoments):
    """The update above; weight decay, if any, is part of the gradient."""


@final
@dataclass(frozen=True, kw_only=True)
class AdamW(AdaptiveMoments):
    """The update above beside a decay of its own: p <- p - lr weight_decay p - lr m' / (sqrt(v') + epsilon)."""

    weight_decay: NonNegative = 0.01

    def decay(self, block: Block, tick: Tick) -> Block:
        np.multiply(block.params, 1 - tick.learning_rate * self.weight_decay, out=block.new_params)
        return block._replace(params=block.new_params)
