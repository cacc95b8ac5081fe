"""The protocol of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from stepctl.arena import Shape
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.state import Counters, TrainState

Metrics = dict[str, float]


class Task(ABC):
    """One update of the state, and its evaluation."""

    targets: Targets

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
        """Apply one update to the arrays (not to the counters) and return what was measured on the way."""

    @abstractmethod
    def increments(self, batch: Batch) -> dict[str, int]:
        """Return by how much each counter rises once this batch's update is complete."""

    @abstractmethod
    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> Metrics:
        """Return the metrics over all batches; nothing changes."""
