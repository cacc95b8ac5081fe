"""Adam (Kingma and Ba 2015, algorithm 1) and AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from stepctl.config.registry import Fraction, Positive
from stepctl.optimizers.base import Block, Optimizer, UpdateInfo
from stepctl.optimizers.groups import WeightDecay
from stepctl.state.arena import Array


@dataclass(frozen=True, kw_only=True)
class AdaptiveMoments(Optimizer):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; p <- p - lr m' / (sqrt(v') + epsilon).

    m' = m / (1 - b1^t) and v' = v / (1 - b2^t), where t is the number of the update (1, 2, ...).

    Args:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the square root, outside of it.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8

    @property
    def slots(self) -> tuple[str, ...]:
        return ("first_moment", "second_moment")

    def coefficients(self, info: UpdateInfo) -> tuple[float, ...]:
        # both bias corrections are in two numbers: p - step_size m / (sqrt(v) + epsilon correction)
        correction = math.sqrt(1 - self.beta2**info.number)
        step_size = info.learning_rate * correction / (1 - self.beta1**info.number)
        # `update_block` multiplies ((1 - beta1) g) g by it, which gives (1 - beta2) g^2
        square_weight = (1 - self.beta2) / (1 - self.beta1)
        return (
            self.beta1,
            1 - self.beta1,
            self.beta2,
            square_weight,
            step_size,
            self.epsilon * correction,
        )

    def update_block(self, block: Block, *coefficients: Array) -> None:
        beta1, gradient_weight, beta2, square_weight, step_size, epsilon = coefficients
        m, v = block.slots
        new_m, new_v = block.new_slots
        g = block.grads
        scratch = block.scratch
        np.multiply(m, beta1, out=new_m)
        np.multiply(g, gradient_weight, out=scratch)
        np.add(new_m, scratch, out=new_m)
        np.multiply(scratch, g, out=scratch)
        np.multiply(scratch, square_weight, out=scratch)
        np.multiply(v, beta2, out=new_v)
        np.add(new_v, scratch, out=new_v)
        np.sqrt(new_v, out=scratch)
        np.add(scratch, epsilon, out=scratch)
        np.divide(new_m, scratch, out=scratch)
        np.multiply(scratch, step_size, out=scratch)
        np.subtract(block.params, scratch, out=block.new_params)


@final
@dataclass(frozen=True, kw_only=True)
class Adam(AdaptiveMoments):
    """Steps along bias-corrected moments of the gradient; weight decay is part of the gradient."""


@final
@dataclass(frozen=True, kw_only=True)
class AdamW(AdaptiveMoments):
    """Adam with decoupled weight decay: p is multiplied by 1 - lr weight_decay before its update.

    Args:
        weight_decay: Multiple of the parameters that is subtracted from them, times the learning
            rate; biases decay too. Or one for each pattern of paths.
    """

    weight_decay: WeightDecay = 0.01

    def decay_factor(self, info: UpdateInfo) -> float:
        return 1 - info.learning_rate * info.weight_decay

    def decay(self, block: Block, info: UpdateInfo) -> Block:
        np.multiply(block.params, self.decay_factor(info), out=block.new_params)
        return block._replace(params=block.new_params)
