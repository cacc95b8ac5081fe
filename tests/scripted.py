"""A task whose evaluations come out as a test wrote them down; its updates are those of a classification."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, final

import numpy as np

from stepctl.arena import Array, Shape, Workspace
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.registry import PositiveInt
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics, Mode
from stepctl.tasks.supervised import Classification, Supervised


@final
class Scripted(Supervised):
    """The i-th evaluation on a grid of `every` steps gives accuracy script[i - 1] (None: NaN), and 1 - that as loss.

    Off the grid it gives values that are better than any.
    """

    targets: Targets = "classes"
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min", "accuracy": "max"}
    training_metrics = ("loss", "accuracy")

    def __init__(
        self, *, script: list[float | None], every: PositiveInt = 2, seed: int, dtype: str, shards: int
    ) -> None:
        super().__init__(seed=seed, dtype=dtype, shards=shards)
        self._script, self._every = script, every

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        return Classification.n_outputs(n_classes, target_shape)

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        return Classification.measure(outputs, y, n, workspace)

    def evaluate(self, state: TrainState, batches: Iterable[Batch], *, average: bool = False) -> Metrics:
        number, off = divmod(state.counters.global_step, self._every)
        found = 2.0 if off else self._script[(number - 1) % len(self._script)]
        accuracy = math.nan if found is None else found
        return {"loss": 1 - accuracy, "accuracy": accuracy}


def sixty_samples() -> tuple[Array, Array]:
    """Return 60 rows of 4 numbers, and their classes, of 3."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(60, 4)), generator.integers(0, 3, 60)
