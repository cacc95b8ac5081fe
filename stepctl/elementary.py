"""Elementary functions that keep their relative precision over the whole range of the dtype."""

from __future__ import annotations

import numpy as np

from stepctl.arena import Array, Workspace


def sigmoid(x: Array, workspace: Workspace) -> tuple[Array, Array]:
    """Return y = 1 / (1 + exp(-x)) and tail = min(y, 1 - y), without the cancellation of 1 - y.

    The derivative is tail (1 - tail). exp is only taken of -|x|, which overflows for no x.
    """
    y, tail, scale = workspace.empty(x.shape), workspace.empty(x.shape), workspace.empty(x.shape)
    decay = tail
    np.abs(x, out=decay)
    np.negative(decay, out=decay)
    np.exp(decay, out=decay)
    np.add(decay, 1, out=scale)
    np.divide(1, scale, out=scale)
    # y = scale where x >= 0 and decay * scale elsewhere; the maximum is quicker than a mask
    np.greater_equal(x, 0, out=y)
    np.maximum(y, decay, out=y)
    np.multiply(y, scale, out=y)
    np.multiply(decay, scale, out=tail)
    return y, tail
