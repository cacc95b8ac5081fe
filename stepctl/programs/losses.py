"""Loss functions: (outputs, targets, n, workspace) -> (loss, gradient with respect to outputs).

The loss is the sum over the rows divided by `n`, the size of the whole batch. The losses of the
parts of a batch therefore add up to the batch's mean loss, and so do their gradients. Formulas: Goodfellow, Bengio
and Courville, "Deep Learning" (2016), section 6.2.2. The gradient is an array of the workspace,
valid until its next `start`.
"""

from __future__ import annotations

import numpy as np

from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace


def softmax_cross_entropy(
    logits: Array, labels: Array, n: int, workspace: Workspace
) -> tuple[float, Array]:
    """Return sum_i (logsumexp(z_i) - z_i[y_i]) / n and its gradient, (softmax(z) - one_hot(y)) / n.

    logits z, gradient: (rows, n_classes); labels y: (rows,) int64 in 0..n_classes-1.
    """
    rows, n_classes = logits.shape
    dlogits = workspace.empty(logits.shape)
    column = workspace.empty((rows, 1))
    at_label = np.arange(0, rows * n_classes, n_classes)
    at_label += labels
    np.maximum.reduce(logits, axis=1, keepdims=True, out=column)
    np.subtract(logits, column, out=dlogits)
    flat = dlogits.reshape(-1)
    z_label = flat[at_label]
    np.exp(dlogits, out=dlogits)
    # The exponentials of the other classes are summed without the label's: where the label's logit
    # is the largest, its exponential is 1, and adding the others to it would round them away. Both
    # loss and gradient depend on them.
    total = flat[at_label]
    flat[at_label] = 0
    others = np.add.reduce(dlogits, axis=1, out=column[:, 0])
    total -= 1
    total += others  # the sum of all exponentials, minus 1
    loss = float((np.log1p(total) - z_label).sum()) / n
    total += 1
    flat[at_label] = -others
    np.divide(1.0 / n, total, out=others)
    np.multiply(dlogits, column, out=dlogits)
    return loss, dlogits


def binary_cross_entropy(
    logits: Array, labels: Array, n: int, workspace: Workspace
) -> tuple[float, Array]:
    """Return sum_i (softplus(z_i) - y_i z_i) / n and its gradient, (sigmoid(z) - y) / n.

    logits z: (rows, 1); labels y: (rows,) int64, 0 or 1; gradient: (rows, 1).
    """
    # With z negated where the label is 1, the loss is softplus(z) and the gradient is sigmoid(z)
    # for both labels, up to the sign of the gradient: no cancellation.
    # softplus(z) = max(z, 0) + log1p(exp(-|z|)) never overflows.
    sign = 1 - 2 * labels.astype(logits.dtype)
    z = logits[:, 0] * sign
    decay = np.exp(-np.abs(z))
    loss = float((np.maximum(z, 0) + np.log1p(decay)).sum()) / n
    dlogits = workspace.empty(logits.shape)
    dlogits[:, 0] = np.where(z < 0, decay, 1) / (1 + decay) * (sign / n)
    return loss, dlogits


def mean_squared_error(
    outputs: Array, targets: Array, n: int, workspace: Workspace
) -> tuple[float, Array]:
    """Return sum_ij (x_ij - y_ij)^2 / (n columns) and its gradient, 2 (x - y) / (n columns).

    outputs x, targets y, gradient: (rows, columns).
    """
    doutputs = workspace.empty(outputs.shape)
    np.subtract(outputs, targets, out=doutputs)
    flat = doutputs.reshape(-1)
    n_terms = n * outputs.shape[1]
    loss = float(np.dot(flat, flat)) / n_terms
    np.multiply(doutputs, 2.0 / n_terms, out=doutputs)
    return loss, doutputs
