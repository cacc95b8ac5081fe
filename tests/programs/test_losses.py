"""Losses follow their published formulas, have the right gradients, and add up over parts of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from stepctl.programs import losses
from stepctl.state.arena import Array
from stepctl.state.workspace import Workspace

Loss = Callable[[Array, Array, int, Workspace], tuple[float, Array]]


class Case(NamedTuple):
    loss: Loss
    one_row: Callable[[list[float], Any], float]  # the textbook's formula
    outputs: Array
    targets: Array


def cross_entropy(z: list[float], label: int) -> float:
    return -math.log(math.exp(z[label]) / sum(math.exp(other) for other in z))


def binary_cross_entropy(z: list[float], y: int) -> float:
    p = 1 / (1 + math.exp(-z[0]))
    return -math.log(p if y == 1 else 1 - p)


def mean_squared_error(z: list[float], y: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(z, y, strict=True)) / len(z)


random = np.random.default_rng(11)
CASES = {
    "softmax_cross_entropy": Case(
        losses.softmax_cross_entropy,
        cross_entropy,
        random.normal(0, 3, (12, 5)),
        random.integers(0, 5, 12),
    ),
    "softmax_cross_entropy of two": Case(
        losses.softmax_cross_entropy,
        cross_entropy,
        random.normal(0, 3, (12, 2)),
        random.integers(0, 2, 12),
    ),
    "binary_cross_entropy": Case(
        losses.binary_cross_entropy,
        binary_cross_entropy,
        random.normal(0, 3, (12, 1)),
        random.integers(0, 2, 12),
    ),
    "mean_squared_error": Case(
        losses.mean_squared_error,
        mean_squared_error,
        random.normal(0, 3, (12, 4)),
        random.normal(0, 3, (12, 4)),
    ),
    "mean_squared_error of one column": Case(
        losses.mean_squared_error,
        mean_squared_error,
        random.normal(0, 3, (12, 1)),
        random.normal(0, 3, (12, 1)),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def measure(
    case: Case, outputs: Array, rows: slice = slice(None), n: int = 12
) -> tuple[float, Array]:
    return case.loss(outputs[rows].copy(), case.targets[rows], n, Workspace(outputs.dtype))


def test_the_value_is_the_mean_of_the_formula_over_the_batch(case: Case) -> None:
    rows = zip(case.outputs.tolist(), case.targets.tolist(), strict=True)
    expected = sum(case.one_row(z, y) for z, y in rows) / 12
    assert measure(case, case.outputs)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_agrees_with_central_differences(case: Case, seed: int) -> None:
    direction = np.random.default_rng(seed).normal(size=case.outputs.shape)
    h = 1e-5
    above, below = (measure(case, case.outputs + sign * h * direction)[0] for sign in (1, -1))
    gradient = measure(case, case.outputs)[1]
    assert (gradient * direction).sum() == pytest.approx((above - below) / (2 * h), rel=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [[6, 6], [3, 3, 3, 3], [1, 11]], ids=str)
def test_parts_of_a_batch_add_up_to_the_whole(case: Case, sizes: list[int], dtype: str) -> None:
    outputs = case.outputs.astype(dtype)
    whole, whole_gradient = measure(case, outputs)
    ends = np.cumsum(sizes).tolist()
    parts = [
        measure(case, outputs, slice(end - size, end))
        for end, size in zip(ends, sizes, strict=True)
    ]
    rel = 1e-5 if dtype == "float32" else 1e-13
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=rel)
    assert {gradient.dtype for _, gradient in parts} == {np.dtype(dtype)}
    np.testing.assert_allclose(
        np.concatenate([gradient for _, gradient in parts]), whole_gradient, rtol=rel
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits_of_a_softmax_stay_finite(dtype: str) -> None:
    logits = np.array([[1000, -1000, 0], [1000, -1000, 0], [-1000, -1000, -1000]], dtype)
    loss, gradient = losses.softmax_cross_entropy(logits, np.array([0, 1, 2]), 1, Workspace(dtype))
    assert loss == pytest.approx(0 + 2000 + math.log(3))
    np.testing.assert_allclose(gradient, [[0, 0, 0], [1, -1, 0], [1 / 3, 1 / 3, -2 / 3]], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits_of_a_binary_cross_entropy_stay_finite(dtype: str) -> None:
    logits = np.array([[1000], [1000], [-1000], [-1000]], dtype)
    loss, gradient = losses.binary_cross_entropy(
        logits, np.array([1, 0, 1, 0]), 1, Workspace(dtype)
    )
    assert loss == 2000
    np.testing.assert_array_equal(gradient, [[0], [1], [-1], [0]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_binary_cross_entropy_keeps_its_relative_precision_however_sure_the_model_is(
    dtype: str,
) -> None:
    end = -np.log(float(np.finfo(dtype).tiny)) - 1
    for z in np.linspace(-end, end, 301).astype(dtype):
        for label in (0, 1):
            exact = np.longdouble(-z if label else z)
            loss, gradient = losses.binary_cross_entropy(
                np.array([[z]]), np.array([label]), 1, Workspace(dtype)
            )
            expected = np.maximum(exact, 0) + np.log1p(np.exp(-np.abs(exact)))
            slope = np.exp(np.minimum(exact, 0)) / (1 + np.exp(-np.abs(exact)))
            tolerance = 8 * float(np.finfo(dtype).eps)
            assert loss == pytest.approx(float(expected), rel=tolerance, abs=0)
            assert gradient[0, 0] == pytest.approx(
                float(-slope if label else slope), rel=tolerance, abs=0
            )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_a_softmax_cross_entropy_keeps_its_relative_precision_however_sure_the_model_is(
    dtype: str, n_classes: int
) -> None:
    for gap in np.linspace(-80, 80, 201).astype(dtype):
        logits = np.full((1, n_classes), 0.5, dtype)
        logits[0, 1] += gap
        exact = logits[0].astype(np.longdouble) - logits[0, 1]
        others = np.exp(np.delete(exact, 1))
        expected = np.log1p(others.sum())
        slopes = np.insert(others, 1, -others.sum()) / (1 + others.sum())
        loss, gradient = losses.softmax_cross_entropy(logits, np.array([1]), 1, Workspace(dtype))
        tolerance = 8 * float(np.finfo(dtype).eps)
        assert loss == pytest.approx(float(expected), rel=tolerance, abs=0)
        np.testing.assert_allclose(gradient[0], slopes.astype(float), rtol=tolerance, atol=0)
