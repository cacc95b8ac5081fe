"""Small data, and a classification task whose evaluations follow a script."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, final

import numpy as np

from stepctl.config.registry import PositiveInt
from stepctl.data.base import Sources, Targets
from stepctl.data.batches import Batch
from stepctl.data.memory import InMemory
from stepctl.programs.base import Metrics, Mode
from stepctl.programs.supervised import Classification, Supervised
from stepctl.state.arena import Array, Shape
from stepctl.state.train_state import TrainState
from stepctl.state.workspace import Workspace


@final
class Scripted(Supervised):
    """Evaluation i on a grid of `every` steps has accuracy script[i - 1] (None: NaN), loss 1 - accuracy.

    Off the grid it gives values that are better than any.
    """

    targets: Targets = "classes"
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min", "accuracy": "max"}
    training_metrics = ("loss", "accuracy")

    def __init__(
        self,
        *,
        script: list[float | None],
        every: PositiveInt = 2,
        seed: int,
        dtype: str,
        shards: int,
    ) -> None:
        super().__init__(seed=seed, dtype=dtype, shards=shards)
        self._script = script
        self._every = every

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        return Classification.n_outputs(n_classes, target_shape)

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        return Classification.measure(outputs, y, n, workspace)

    def evaluate(
        self, state: TrainState, batches: Iterable[Batch], *, average: bool = False
    ) -> Metrics:
        number, off = divmod(state.counters.global_step, self._every)
        found = 2.0 if off else self._script[(number - 1) % len(self._script)]
        accuracy = math.nan if found is None else found
        return {"loss": 1 - accuracy, "accuracy": accuracy}


def sixty(*, targets: Targets, dtype: str) -> Sources:
    """60 rows of 4 numbers, and their classes, of 3."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 4))
    y = generator.integers(0, 3, 60)
    return Sources(InMemory(x, y, origin="sixty", targets=targets, dtype=dtype))
