"""Elementary functions with full relative precision over the whole range of the dtype."""

from __future__ import annotations

import numpy as np

from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace


def sigmoid(x: Array, workspace: Workspace) -> tuple[Array, Array]:
    """Return y = 1 / (1 + exp(-x)) and tail = min(y, 1 - y), of the shape of x.

    The derivative is tail (1 - tail). The argument of exp is -|x|, so it does not overflow, and no
    1 - y cancels.
    """
    y = workspace.empty(x.shape)
    exponential = workspace.empty(x.shape)  # exp(-|x|)
    larger = workspace.empty(x.shape)  # max(y, 1 - y) = 1 / (1 + exp(-|x|))
    np.abs(x, out=exponential)
    np.negative(exponential, out=exponential)
    np.exp(exponential, out=exponential)
    np.add(exponential, 1, out=larger)
    np.divide(1, larger, out=larger)
    # y = larger where x >= 0, else exponential * larger; the maximum is faster than a mask
    np.greater_equal(x, 0, out=y)
    np.maximum(y, exponential, out=y)
    np.multiply(y, larger, out=y)
    tail = exponential
    np.multiply(exponential, larger, out=tail)
    return y, tail
