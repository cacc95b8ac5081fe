"""User code that computes different results each time."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from stepctl.data.base import Source, Sources, Targets
from stepctl.data.digits import digits
from stepctl.models.base import Backward
from stepctl.optimizers.base import Block
from stepctl.optimizers.sgd import SGD
from stepctl.programs.base import Metrics, Task
from stepctl.programs.supervised import Classification
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.train_state import TrainState
from stepctl.state.workspace import Workspace
from tests.support.user_model import Centred, TwoLayers

_calls = itertools.count()
_builds = itertools.count()
builds: list[str] = []  # of the models below, by their classes


class Steady(TwoLayers):
    """A model that computes the same each time."""

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        builds.append(type(self).__name__)
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)

    def mood(self, *, training: bool) -> float:
        return 0.0

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        outputs, backward = super().forward(params, x, workspace)
        return outputs * outputs.dtype.type(
            1 + self.mood(training=workspace.rng is not None)
        ), backward


class Unseeded(Steady):
    """A generator without a seed."""

    def mood(self, *, training: bool) -> float:
        if not training:
            return 0.0
        return float(np.random.default_rng().normal())


class GlobalNumPy(Steady):
    """NumPy's global generator, seeded once."""

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        np.random.seed(0)  # noqa: NPY002
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)

    def mood(self, *, training: bool) -> float:
        if not training:
            return 0.0
        return float(np.random.normal())  # noqa: NPY002


class GlobalPython(Steady):
    """Python's global generator."""

    def mood(self, *, training: bool) -> float:
        if not training:
            return 0.0
        return random.random()


class CountsCalls(Steady):
    """Something on self that each call changes."""

    calls = 0

    def mood(self, *, training: bool) -> float:
        self.calls += training
        return self.calls / 1000


class OneGradient(Steady):
    """Only one gradient differs, and only in its last bits."""

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        outputs, backward = super().forward(params, x, workspace)

        def unsteady(dy: Array, grads: Arena) -> None:
            backward(dy, grads)
            grads["in/b"][0] = np.float32(1) + next(_calls) * np.spacing(np.float32(1))

        return outputs, unsteady


class OneBuffer(Centred):
    """Only a buffer differs."""

    def new_mean(self, mean: Array, workspace: Workspace) -> Array:
        super().new_mean(mean, workspace)
        assert workspace.new_buffers is not None
        workspace.new_buffers["mean"][0] = next(_calls)
        return mean


class Initializes(Steady):
    """Other parameters each time; they are in the first checkpoint, so a resume is still exact."""

    def initialize(self, params: Arena, rng: Any) -> None:
        super().initialize(params, lambda name: np.random.default_rng())


class OnlyOnce(Steady):
    """A model that cannot be built a second time."""

    def __init__(self, *, input_shape: Shape, n_outputs: int) -> None:
        if next(_builds):
            raise RuntimeError("this port is in use")
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)


@dataclass(frozen=True, kw_only=True)
class Jitters(SGD):
    """An optimizer that adds a little."""

    def update_block(self, block: Block, *coefficients: Array) -> None:
        super().update_block(block, *coefficients)
        block.new_params[0] += next(_calls)


class Samples(Classification):  # type: ignore[misc]
    """A task whose loss is of different rows each time."""

    def step(self, state: TrainState, batch: Any) -> Metrics:
        return super().step(state, batch) | {"loss": float(next(_calls))}


class Alone(Task):
    """A task with a step of its own, which depends on earlier calls."""

    targets: Any = "classes"
    metrics: ClassVar[Any] = {"loss": "min"}
    training_metrics = ("loss",)
    calls = 0

    def ends(self, n_classes: int | None, sample_shape: Any, target_shape: Any) -> Any:
        return Classification.ends(self, n_classes, sample_shape, target_shape)  # type: ignore[arg-type]

    n_outputs = staticmethod(Classification.n_outputs)

    def trial(self, state: TrainState, batch: Any) -> None:
        self.calls += 1

    def step(self, state: TrainState, batch: Any) -> Metrics:
        return {"loss": float(self.calls)}

    def evaluate(self, state: TrainState, batches: Any, *, average: bool = False) -> Metrics:
        return {"loss": 0.0}


def noisy_digits(*, targets: Targets, dtype: str) -> Sources:
    """The digits with noise that nobody can draw again."""
    source = digits(targets=targets, dtype=dtype).train
    return Sources(Noisy(source))


class Noisy(Source):
    """A source that augments with a generator of its own."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.origin = source.origin
        self.n = source.n
        self.sample_shape = source.sample_shape
        self.target_shape = source.target_shape

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        self._source.read(rows, x, y)
        x += np.random.default_rng().normal(size=x.shape)

    def slices(self) -> Any:
        return self._source.slices()

    def fingerprint(self) -> str:
        return self._source.fingerprint()
