"""Losses: outputs and targets -> (the summed loss over n, its gradient).

`n` is the size of the whole batch, so that the parts of a batch add up to the batch's mean.
"""

from __future__ import annotations

import numpy as np

from stepctl.arena import Array, Workspace


def softmax_cross_entropy(logits: Array, labels: Array, n: int, workspace: Workspace) -> tuple[float, Array]:
    """Return sum_i(logsumexp(z_i) - z_i[label_i]) / n and its gradient, (softmax(z) - one_hot) / n.

    logits: (rows, classes); labels: (rows,) int64.
    """
    rows, n_classes = logits.shape
    gradient = workspace.empty(logits.shape)
    column = workspace.empty((rows, 1))
    at_label = np.arange(0, rows * n_classes, n_classes)
    at_label += labels
    np.maximum.reduce(logits, axis=1, keepdims=True, out=column)
    np.subtract(logits, column, out=gradient)
    flat = gradient.reshape(-1)
    z_label = flat[at_label]
    np.exp(gradient, out=gradient)
    # The others are summed apart from the label: where that is the largest, its exp is 1, and the loss and the gradient
    # at the label are the sum of the others, which the 1 would swallow.
    total = flat[at_label]
    flat[at_label] = 0
    others = np.add.reduce(gradient, axis=1, out=column[:, 0])
    total -= 1
    total += others  # minus 1, so far
    loss = float((np.log1p(total) - z_label).sum()) / n
    total += 1
    flat[at_label] = -others
    np.divide(1.0 / n, total, out=others)
    np.multiply(gradient, column, out=gradient)
    return loss, gradient


def binary_cross_entropy(logits: Array, labels: Array, n: int, workspace: Workspace) -> tuple[float, Array]:
    """Return sum_i(softplus(z_i) - y_i z_i) / n and its gradient, (sigmoid(z) - y) / n.

    logits: (rows, 1); labels: (rows,) int64, 0 or 1.
    """
    # With the sign of a label 1 turned, both labels have loss softplus(z) and gradient sigmoid(z), up to that sign:
    # no difference of nearly equal numbers. softplus(z) = max(z, 0) + log1p(exp(-|z|)) overflows for no z.
    sign = 1 - 2 * labels.astype(logits.dtype)
    z = logits[:, 0] * sign
    decay = np.exp(-np.abs(z))
    loss = float((np.maximum(z, 0) + np.log1p(decay)).sum()) / n
    dlogits = workspace.empty(logits.shape)
    dlogits[:, 0] = np.where(z < 0, decay, 1) / (1 + decay) * (sign / n)
    return loss, dlogits


def mean_squared_error(outputs: Array, targets: Array, n: int, workspace: Workspace) -> tuple[float, Array]:
    """Return the sum of squared differences over n * columns, and its gradient.

    outputs, targets: (rows, columns).
    """
    difference = workspace.empty(outputs.shape)
    np.subtract(outputs, targets, out=difference)
    flat = difference.reshape(-1)
    n_terms = n * outputs.shape[1]
    loss = float(np.dot(flat, flat)) / n_terms
    np.multiply(difference, 2.0 / n_terms, out=difference)
    return loss, difference
