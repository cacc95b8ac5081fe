"""The protocol of a task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

from stepctl.arena import Arena, Shape, all_finite
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.errors import NonFiniteError
from stepctl.state import Counters, TrainState

Metrics = dict[str, float]


def refuse_non_finite(step: int, loss: float, gradient: Arena) -> None:
    """Raise NonFiniteError, with the first bad array, if the update to `step` would spoil the parameters."""
    if math.isfinite(loss) and all_finite(gradient.flat):
        return
    bad = next((name for name, array in gradient.items() if not all_finite(array)), None)
    where = f"first bad array: the gradient of {bad}" if bad else "the gradient is finite"
    raise NonFiniteError(f"step {step}: the loss is {loss}; {where}")


class Task(ABC):
    """One update of the state, and its evaluation."""

    targets: Targets
    metrics: tuple[str, ...]  # what `evaluate` returns

    @staticmethod
    @abstractmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        """Return how many outputs the model needs."""

    @abstractmethod
    def initial_state(self, initial_step: int) -> TrainState:
        """Return the state before the first update."""

    @abstractmethod
    def check_counters(self, counters: Counters, initial_step: int) -> None:
        """Raise CheckpointError if the counters cannot belong together."""

    @abstractmethod
    def trial(self, state: TrainState, batch: Batch) -> None:
        """Compute what a step would, changing nothing; ConfigError if the model breaks its protocol."""

    @abstractmethod
    def step(self, state: TrainState, batch: Batch) -> Metrics:
        """Apply one update to the arrays (not to the counters) and return what was measured on the way.

        NonFiniteError, or any error of the model's, must come before anything is changed; TornUpdate after that.
        """

    @abstractmethod
    def increments(self, batch: Batch) -> dict[str, int]:
        """Return by how much each counter rises once this batch's update is complete."""

    @abstractmethod
    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> Metrics:
        """Return the metrics over all batches; nothing changes."""
