"""Learning from targets: one model, one optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from typing import ClassVar, final

import numpy as np

from stepctl import losses
from stepctl.arena import Arena, Array, Shape, Workspace
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.errors import ConfigError
from stepctl.models.base import Ends
from stepctl.rng import rng
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics, Mode, OneUpdate, refuse_non_finite, summed
from stepctl.tasks.learner import MODEL, Learner
from stepctl.tasks.shards import Part, ShardSum


class Supervised(OneUpdate):
    """One global step is one update of one model from one batch.

    The batch is cut into `shards` equal parts; each part's gradient is that of its share of the batch's mean
    loss, and they are summed in a fixed binary tree. The model's buffers become the mean of what they become by
    each part.
    """

    divisible = sliced = buffered = True

    def __init__(self, *, seed: int, dtype: str, shards: int) -> None:
        self._seed, self._shards = seed, shards
        self._training, self._evaluation = Workspace(dtype), Workspace(dtype)
        self._gradients: ShardSum | None = None

    @property
    def _learner(self) -> Learner:
        return self.learners[MODEL]

    def ends(self, n_classes: int | None, sample_shape: Shape, target_shape: Shape) -> dict[str, Ends]:
        return {MODEL: Ends(sample_shape, self.n_outputs(n_classes, target_shape))}

    @staticmethod
    @abstractmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        """Return how many outputs the model needs."""

    @staticmethod
    @abstractmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        """Return this part's share of the metrics of n samples, and the loss's gradient at the outputs."""

    def trial(self, state: TrainState, batch: Batch) -> None:
        self._sum(state).trial(len(batch.x), self._part(state, batch))
        self._learner.trial(state)

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        gradient, buffers, metrics = self._computed(state, batch)
        metrics |= self.apply(state, gradient, state.counters)
        state.buffers.copy_from(buffers)
        return metrics

    def gradient(self, state: TrainState, batch: Batch) -> tuple[Arena, Metrics]:
        gradient, _, metrics = self._computed(state, batch)
        return gradient, metrics

    def _computed(self, state: TrainState, batch: Batch) -> tuple[Arena, Arena, Metrics]:
        gradient, buffers, metrics = self._sum(state)(len(batch.x), self._part(state, batch))
        refuse_non_finite(state.counters.global_step + 1, metrics["loss"], gradient, buffers=buffers)
        return gradient, buffers, metrics

    def apply(self, state: TrainState, gradient: Arena, counts: Mapping[str, int]) -> Metrics:
        return self._learner.update(state, gradient, counts)

    def _sum(self, state: TrainState) -> ShardSum:
        if self._gradients is None:
            params = self._learner.params(state)
            self._gradients = ShardSum(params, state.buffers, self._shards, self.comm, MODEL)
        return self._gradients

    def _part(self, state: TrainState, batch: Batch) -> Part:
        params, step, n = self._learner.params(state), state.counters.global_step, len(batch.x) * self.comm.size

        def part(shard: int, at: slice, gradient: Arena, buffers: Arena) -> Metrics:
            self._training.start(partial(self._rng, step, shard), state.buffers, buffers)
            outputs, backward = self._learner.forward(params, batch.x[at], self._training)
            metrics, doutputs = self.measure(outputs, batch.y[at], n, self._training)
            backward(doutputs, gradient)
            return metrics

        return part

    def evaluate(self, state: TrainState, batches: Iterable[Batch], *, average: bool = False) -> Metrics:
        params, parts, n = self._learner.params(state, average=average), [], 0
        for batch in batches:
            self._evaluation.start(buffers=state.buffers)
            outputs, _ = self._learner.forward(params, batch.x, self._evaluation)
            parts.append(self.measure(outputs, batch.y, 1, self._evaluation)[0])
            n += len(batch.x)
        return {name: value / n for name, value in summed(parts).items()}

    def _rng(self, step: int, shard: int, name: str) -> np.random.Generator:
        return rng(self._seed, f"step/{name}", step, shard)


@final
class Classification(Supervised):
    """Labels 0..n_classes-1 under softmax cross-entropy; one output a class."""

    targets: Targets = "classes"
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min", "accuracy": "max"}
    training_metrics = ("loss", "accuracy")

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        assert n_classes is not None
        return n_classes

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        correct = int(np.count_nonzero(outputs.argmax(axis=1) == y))
        loss, doutputs = losses.softmax_cross_entropy(outputs, y, n, workspace)
        return {"loss": loss, "accuracy": correct / n}, doutputs


@final
class BinaryClassification(Supervised):
    """Labels 0 and 1 under binary cross-entropy; one output, whose sign is the answer."""

    targets: Targets = "classes"
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min", "accuracy": "max"}
    training_metrics = ("loss", "accuracy")

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        if n_classes != 2:
            assert n_classes is not None
            if n_classes == 1:
                found, remedy = "every label is 0", "bring data with both"
            else:
                found = f"the largest label, or data.n_classes - 1, is {n_classes - 1}"
                remedy = "subtract 1 from labels 1 and 2; for more than two classes use classification"
            raise ConfigError(f"task.name: binary_classification needs labels 0 and 1, but {found}; {remedy}")
        return 1

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        correct = int(np.count_nonzero((outputs[:, 0] > 0) == y))
        loss, doutputs = losses.binary_cross_entropy(outputs, y, n, workspace)
        return {"loss": loss, "accuracy": correct / n}, doutputs


@final
class Regression(Supervised):
    """Numbers under mean squared error; one output a column of the targets."""

    targets: Targets = "values"
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min"}
    training_metrics = ("loss",)

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        return target_shape[0]

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        loss, doutputs = losses.mean_squared_error(outputs, y, n, workspace)
        return {"loss": loss}, doutputs
