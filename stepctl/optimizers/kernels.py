"""Updates that numba compiles (extra `numba`): one pass over the arrays, with the bits of NumPy.

A kernel applies to each element the operations of `update_block`, in the same order and in the
arrays' dtype. They are additions, multiplications, divisions and square roots, which IEEE 754
rounds exactly, and the compiler neither reorders nor contracts them (no fused multiply-add).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np

from stepctl.optimizers.adagrad import Adagrad
from stepctl.optimizers.adam import Adam, AdamW
from stepctl.optimizers.base import Optimizer, Run
from stepctl.optimizers.rmsprop import RMSProp
from stepctl.optimizers.sgd import SGD
from stepctl.state.arena import Array

Kernel = Callable[..., None]

# Elements of a block that is copied and then updated, where an update is out of place. The blocks of
# all arrays fit in the cache together.
_COPIED_BLOCK = 1 << 14


# --- the kernels
#
# bounds: (runs, 2) int64, start and stop of each run of elements that have the same numbers
# numbers: (runs, 3 + n) of the arrays' dtype: the clip factor; 1 if there is weight decay, else 0;
#     its factor (`Optimizer.decay_factor`); and the optimizer's n coefficients
# grads, params, slots: (elements,); parameters and slots are updated in place


def _sgd(bounds: Array, numbers: Array, grads: Array, params: Array) -> None:
    for run in range(len(bounds)):
        clip, decays, decay, learning_rate, _ = numbers[run]
        at = slice(bounds[run, 0], bounds[run, 1])
        grad = grads[at]
        p = params[at]
        for i in range(len(p)):
            g = grad[i] * clip
            if decays != 0:
                g = g + p[i] * decay
            p[i] = p[i] - g * learning_rate


def _momentum(bounds: Array, numbers: Array, grads: Array, params: Array, velocity: Array) -> None:
    for run in range(len(bounds)):
        clip, decays, decay, learning_rate, momentum = numbers[run]
        at = slice(bounds[run, 0], bounds[run, 1])
        grad = grads[at]
        p = params[at]
        v = velocity[at]
        for i in range(len(p)):
            g = grad[i] * clip
            if decays != 0:
                g = g + p[i] * decay
            v[i] = v[i] * momentum + g
            p[i] = p[i] - v[i] * learning_rate


def _nesterov(bounds: Array, numbers: Array, grads: Array, params: Array, velocity: Array) -> None:
    for run in range(len(bounds)):
        clip, decays, decay, learning_rate, momentum = numbers[run]
        at = slice(bounds[run, 0], bounds[run, 1])
        grad = grads[at]
        p = params[at]
        v = velocity[at]
        for i in range(len(p)):
            g = grad[i] * clip
            if decays != 0:
                g = g + p[i] * decay
            v[i] = v[i] * momentum + g
            p[i] = p[i] - (v[i] * momentum + g) * learning_rate


def _adagrad(bounds: Array, numbers: Array, grads: Array, params: Array, sums: Array) -> None:
    for run in range(len(bounds)):
        clip, decays, decay, learning_rate, epsilon = numbers[run]
        at = slice(bounds[run, 0], bounds[run, 1])
        grad = grads[at]
        p = params[at]
        s = sums[at]
        for i in range(len(p)):
            g = grad[i] * clip
            if decays != 0:
                g = g + p[i] * decay
            s[i] = s[i] + g * g
            p[i] = p[i] - g / (sqrt(s[i]) + epsilon) * learning_rate


def _rmsprop(bounds: Array, numbers: Array, grads: Array, params: Array, means: Array) -> None:
    for run in range(len(bounds)):
        clip, decays, decay, learning_rate, decay_rate, gradient_weight, epsilon = numbers[run]
        at = slice(bounds[run, 0], bounds[run, 1])
        grad = grads[at]
        p = params[at]
        s = means[at]
        for i in range(len(p)):
            g = grad[i] * clip
            if decays != 0:
                g = g + p[i] * decay
            s[i] = s[i] * decay_rate + g * g * gradient_weight
            p[i] = p[i] - g / (sqrt(s[i]) + epsilon) * learning_rate


def _adam(
    bounds: Array, numbers: Array, grads: Array, params: Array, first: Array, second: Array
) -> None:
    for run in range(len(bounds)):
        clip, decays, decay, beta1, gradient_weight, beta2, square_weight, step_size, epsilon = (
            numbers[run]
        )
        at = slice(bounds[run, 0], bounds[run, 1])
        grad = grads[at]
        p = params[at]
        m = first[at]
        v = second[at]
        for i in range(len(p)):
            g = grad[i] * clip
            if decays != 0:
                g = g + p[i] * decay
            weighted = g * gradient_weight
            m[i] = m[i] * beta1 + weighted
            v[i] = v[i] * beta2 + weighted * g * square_weight
            p[i] = p[i] - m[i] / (sqrt(v[i]) + epsilon) * step_size


def _adamw(
    bounds: Array, numbers: Array, grads: Array, params: Array, first: Array, second: Array
) -> None:
    for run in range(len(bounds)):
        # without weight decay the factor is 1
        clip, _, kept, beta1, gradient_weight, beta2, square_weight, step_size, epsilon = numbers[
            run
        ]
        at = slice(bounds[run, 0], bounds[run, 1])
        grad = grads[at]
        p = params[at]
        m = first[at]
        v = second[at]
        for i in range(len(p)):
            g = grad[i] * clip
            weighted = g * gradient_weight
            m[i] = m[i] * beta1 + weighted
            v[i] = v[i] * beta2 + weighted * g * square_weight
            p[i] = p[i] * kept - m[i] / (sqrt(v[i]) + epsilon) * step_size


def moving_average(bounds: Array, numbers: Array, params: Array, average: Array) -> None:
    """Update an average in place; numbers: (runs, 2), the decay d and 1 - d."""
    for run in range(len(bounds)):
        decay, weight = numbers[run]
        at = slice(bounds[run, 0], bounds[run, 1])
        p = params[at]
        a = average[at]
        for i in range(len(a)):
            a[i] = a[i] * decay + p[i] * weight


def _sgd_kernel(optimizer: SGD) -> Kernel:
    if not optimizer.momentum:
        return _sgd
    return _nesterov if optimizer.nesterov else _momentum


# A subclass of one of these is a user's: it may override any method, and is not compiled.
_KERNELS: dict[type[Optimizer], Callable[[Any], Kernel]] = {
    SGD: _sgd_kernel,
    Adagrad: lambda optimizer: _adagrad,
    RMSProp: lambda optimizer: _rmsprop,
    Adam: lambda optimizer: _adam,
    AdamW: lambda optimizer: _adamw,
}


def kernel_of(optimizer: Optimizer) -> Kernel | None:
    """Return the kernel that is equivalent to the optimizer's `update_block`; None for a user's own."""
    find = _KERNELS.get(type(optimizer))
    return None if find is None else find(optimizer)


@lru_cache(maxsize=64)
def _bounds(bounds: tuple[tuple[int, int], ...]) -> Array:
    """Return starts and stops as an array; cached, because they are the same at every step."""
    return np.array(bounds)


class CompiledUpdate:
    """The compiled update of one optimizer."""

    def __init__(self, optimizer: Optimizer, kernel: Kernel) -> None:
        """`kernel` is that of `kernel_of`, compiled for the dtype of the arrays."""
        self._optimizer = optimizer
        self._kernel = kernel

    def __call__(
        self,
        sources: Sequence[Array | None],
        grads: Array,
        arrays: Sequence[Array],
        runs: Sequence[Run],
        scale: float | None,
        start: int,
        end: int,
    ) -> None:
        """Update the elements from `start` to `end` of parameters and slots, in place.

        Where the update is out of place, `sources` has the array of the old values, else None.
        `scale` is the clip factor.
        """
        bounds = []
        rows = []
        clip = 1.0 if scale is None else scale
        for run in runs:
            first = max(run.start, start)
            stop = min(run.stop, end)
            if first >= stop:
                continue
            decay = self._optimizer.decay_factor(run.info)
            decays = bool(run.info.weight_decay)
            bounds.append((first, stop))
            rows.append((clip, decays, decay, *run.coefficients))
        if not rows:
            return
        numbers = np.array(rows, grads.dtype)
        copies = [
            (source, array)
            for source, array in zip(sources, arrays, strict=True)
            if source is not None
        ]
        if not copies:
            self._kernel(_bounds(tuple(bounds)), numbers, grads, *arrays)
            return
        for number, (first, stop) in enumerate(bounds):
            for block in range(first, stop, _COPIED_BLOCK):
                block_stop = min(block + _COPIED_BLOCK, stop)
                for source, array in copies:
                    array[block:block_stop] = source[block:block_stop]
                block_bounds = np.array([(block, block_stop)])
                self._kernel(block_bounds, numbers[number : number + 1], grads, *arrays)
