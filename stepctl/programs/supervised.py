"""Supervised tasks: one model, one optimizer, samples with targets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, final

import numpy as np

from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.errors import ConfigError
from stepctl.models.base import ModelShapes
from stepctl.programs import losses
from stepctl.programs.base import Metrics, Mode, Predictions, sum_metrics
from stepctl.programs.learner import MODEL
from stepctl.programs.one_model import OneModel
from stepctl.programs.shards import ShardFunction
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.train_state import TrainState
from stepctl.state.workspace import Workspace


class Supervised(OneModel):
    """A model that maps each row to outputs, and a loss that compares them with the row's target."""

    def __init__(self, *, seed: int, dtype: str, shards: int) -> None:
        super().__init__(seed=seed, dtype=dtype, shards=shards)
        self._training = Workspace(dtype)
        self._evaluation = Workspace(dtype)

    def ends(
        self, n_classes: int | None, sample_shape: Shape, target_shape: Shape
    ) -> dict[str, ModelShapes]:
        return {MODEL: ModelShapes(sample_shape, self.n_outputs(n_classes, target_shape))}

    @staticmethod
    @abstractmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        """Return the number of outputs that the model needs."""

    @staticmethod
    @abstractmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        """Return these rows' metrics, summed and divided by n, and the loss's gradient.

        outputs, gradient: (rows, n_outputs); y: (rows,) int64 or (rows, columns).
        """

    def _shard_function(self, state: TrainState, batch: Batch) -> ShardFunction:
        params = self._learner.params(state)
        step = state.counters.global_step
        n = len(batch.x) * self.comm.size
        workspace = self._training

        def compute(shard: int, at: slice, gradient: Arena, buffers: Arena) -> Metrics:
            workspace.start(partial(self._rng, step, shard), state.buffers, buffers)
            outputs, backward = self._learner.forward(params, batch.x[at], workspace)
            metrics, doutputs = self.measure(outputs, batch.y[at], n, workspace)
            backward(doutputs, gradient)
            return metrics

        return compute

    def evaluate(
        self, state: TrainState, batches: Iterable[Batch], *, average: bool = False
    ) -> Metrics:
        params = self._learner.params(state, average=average)
        workspace = self._evaluation
        parts: list[Metrics] = []
        n = 0
        for batch in batches:
            workspace.start(buffers=state.buffers)
            outputs, _ = self._learner.forward(params, batch.x, workspace)
            metrics, _ = self.measure(outputs, batch.y, 1, workspace)
            parts.append(metrics)
            n += len(batch.x)
        return {name: value / n for name, value in sum_metrics(parts).items()}

    @final
    def predict(self, state: TrainState, x: Array, *, average: bool = False) -> Predictions:
        workspace = self._evaluation
        workspace.start(buffers=state.buffers)
        params = self._learner.params(state, average=average)
        outputs, _ = self._learner.forward(params, x, workspace)
        return self.interpret(outputs)

    @staticmethod
    def interpret(outputs: Array) -> Predictions:
        """Return the predictions from the model's outputs, (rows, n_outputs)."""
        return Predictions(outputs.copy())


@final
class Classification(Supervised):
    """Softmax cross-entropy of labels 0..n_classes-1; one output (a logit) per class."""

    targets: Targets = "classes"
    classifies = True
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

    @staticmethod
    def interpret(outputs: Array) -> Predictions:
        probabilities = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        return Predictions(outputs.argmax(axis=1), probabilities)


@final
class BinaryClassification(Supervised):
    """Binary cross-entropy of labels 0 and 1; one output, the logit of label 1."""

    targets: Targets = "classes"
    classifies = True
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min", "accuracy": "max"}
    training_metrics = ("loss", "accuracy")

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        if n_classes != 2:
            assert n_classes is not None
            if n_classes == 1:
                found = "every label is 0"
                remedy = "use data with both labels"
            else:
                found = f"the largest label, or data.n_classes - 1, is {n_classes - 1}"
                remedy = (
                    "subtract 1 from labels 1 and 2; for more than two classes use classification"
                )
            raise ConfigError(
                f"task.name: binary_classification needs labels 0 and 1, but {found}; {remedy}"
            )
        return 1

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        correct = int(np.count_nonzero((outputs[:, 0] > 0) == y))
        loss, doutputs = losses.binary_cross_entropy(outputs, y, n, workspace)
        return {"loss": loss, "accuracy": correct / n}, doutputs

    @staticmethod
    def interpret(outputs: Array) -> Predictions:
        logits = outputs[:, 0]
        exponential = np.exp(-np.abs(logits))
        likelier = 1 / (1 + exponential)
        is_one = logits > 0
        probabilities = np.empty((len(outputs), 2), outputs.dtype)
        probabilities[:, 1] = np.where(is_one, likelier, exponential * likelier)
        probabilities[:, 0] = np.where(is_one, exponential * likelier, likelier)
        return Predictions(is_one.astype(np.int64), probabilities)


@final
class Regression(Supervised):
    """Mean squared error; one output per column of the targets."""

    targets: Targets = "values"
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min"}
    training_metrics = ("loss",)

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        if len(target_shape) != 1:
            shape = ", ".join(["rows", *map(str, target_shape)])
            raise ConfigError(
                f"task.name: regression needs y of shape (rows,) or (rows, columns), but it has "
                f"({shape}); flatten each row of y"
            )
        return target_shape[0]

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        loss, doutputs = losses.mean_squared_error(outputs, y, n, workspace)
        return {"loss": loss}, doutputs
