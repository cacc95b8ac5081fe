"""A user's task with chosen metrics."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from stepctl.data.batches import Batch
from stepctl.programs.base import Metrics
from stepctl.programs.supervised import Classification
from stepctl.state.train_state import TrainState

# what a user may call a number, and what a row holds then
NUMBERS: dict[str, tuple[Any, float]] = {
    "float64": (np.float64(0.5), 0.5),
    "float32": (np.float32(0.1), float(np.float32(0.1))),
    "float16": (np.float16(0.5), 0.5),
    "longdouble": (np.longdouble(0.5), 0.5),
    "int64": (np.int64(7), 7),
    "uint8": (np.uint8(7), 7),
    "bool": (np.bool_(True), 1),
    "python_bool": (True, 1),
    "array": (np.array(0.25), 0.25),
    "int_array": (np.array(3), 3),
    "python_int": (3, 3),
    "fraction": (Fraction(1, 4), 0.25),
}
WRONG: dict[str, tuple[Any, str]] = {
    "text": ("0.5", "as a str"),
    "none": (None, "as a NoneType"),
    "list": ([0.5], "as a list"),
    "vector": (np.zeros(1), "as an array of shape (1,)"),
    "complex": (1j, "as a complex"),
    "complex64": (np.complex64(1), "as a complex64"),
    "objects": (np.array(None), "as a ndarray"),
    "decimal": (Decimal(1), "as a Decimal"),
}


class Measures(Classification):  # type: ignore[misc]
    """A classification that returns more than it must."""

    training_metrics: tuple[str, ...] = (*Classification.training_metrics, *NUMBERS)  # type: ignore

    def __init__(
        self, *, wrong: str = "", whole: bool = False, seed: int, dtype: str, shards: int
    ) -> None:
        super().__init__(seed=seed, dtype=dtype, shards=shards)
        self._wrong = wrong
        self._whole = whole

    def _more(self, metrics: Metrics) -> Any:
        if self._whole:
            return WRONG[self._wrong][0]
        if self._wrong:
            return metrics | {"odd": WRONG[self._wrong][0]}
        found = {name: np.float32(value) for name, value in metrics.items()}
        return found | {name: value for name, (value, _) in NUMBERS.items()}

    def step(self, state: TrainState, batch: Batch) -> Any:
        return self._more(super().step(state, batch))

    def evaluate(self, state: TrainState, batches: Any, *, average: bool = False) -> Any:
        return self._more(super().evaluate(state, batches, average=average))


class TakesAName(Classification):  # type: ignore[misc]
    """A classification that calls a metric as every row calls its step."""

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        return super().step(state, batch) | {"step": 1.0}


class LeavesOneOut(Classification):  # type: ignore[misc]
    """A classification whose evaluation lacks a metric that it declares."""

    def evaluate(self, state: TrainState, batches: Any, *, average: bool = False) -> Metrics:
        found = super().evaluate(state, batches, average=average)
        return {"loss": found["loss"]}
