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
    probabilities = workspace.empty(logits.shape)
    column = workspace.empty((rows, 1))
    at_label = np.arange(0, rows * n_classes, n_classes)
    at_label += labels
    np.maximum.reduce(logits, axis=1, keepdims=True, out=column)
    np.subtract(logits, column, out=probabilities)
    flat = probabilities.reshape(-1)
    correct = flat[at_label]
    np.exp(probabilities, out=probabilities)
    np.add.reduce(probabilities, axis=1, keepdims=True, out=column)
    loss = (float(np.log(column).sum()) - float(correct.sum())) / n
    np.divide(1.0 / n, column, out=column)
    np.multiply(probabilities, column, out=probabilities)
    flat[at_label] -= 1.0 / n
    return loss, probabilities


def binary_cross_entropy(logits: Array, labels: Array, n: int, workspace: Workspace) -> tuple[float, Array]:
    """Return sum_i(softplus(z_i) - y_i z_i) / n and its gradient, (sigmoid(z) - y) / n.

    logits: (rows, 1); labels: (rows,) int64, 0 or 1.
    """
    z = logits[:, 0]
    y = labels.astype(z.dtype)
    # softplus(z) = max(z, 0) + log1p(exp(-|z|)), which overflows for no z
    loss = float((np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))) - y * z).sum()) / n
    dlogits = workspace.empty(logits.shape)
    dlogits[:, 0] = (0.5 * (1 + np.tanh(0.5 * z)) - y) / n
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
