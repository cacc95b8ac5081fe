"""Learning from targets: one model, one optimizer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import final

import numpy as np

from stepctl import losses
from stepctl.arena import Arena, Array, Shape, TreeSum, Workspace
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.errors import CheckpointError, ConfigError
from stepctl.models.base import Backward, Model
from stepctl.optimizers.base import Optimizer, Tick
from stepctl.rng import rng
from stepctl.state import GLOBAL_STEP, SAMPLES_SEEN, Counters, TrainState
from stepctl.tasks.base import Metrics, Task, refuse_non_finite

_MODEL = "model"  # the name of the one optimizer and its counter


class Supervised(Task):
    """One global step is one update of one model from one batch.

    The batch is cut into `shards` equal parts; each part's gradient is that of its share of the batch's mean
    loss, and they are summed in a fixed binary tree.
    """

    def __init__(
        self, *, model: Model, optimizer: Optimizer, n_outputs: int, seed: int, dtype: str, shards: int, threads: int
    ) -> None:
        self.model, self.optimizer, self._n_outputs = model, optimizer, n_outputs
        self._seed, self._dtype, self._shards, self._threads = seed, dtype, shards, threads
        self._training, self._evaluation = Workspace(dtype), Workspace(dtype)
        self._gradients: TreeSum | None = None

    @staticmethod
    @abstractmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        """Return this part's share of the metrics of n samples, and the loss's gradient at the outputs."""

    def initial_state(self, initial_step: int) -> TrainState:
        params = Arena(self.model.parameter_shapes(), self._dtype)
        self.model.initialize(params, lambda name: rng(self._seed, f"init/{name}"))
        return TrainState(
            counters=Counters({GLOBAL_STEP: initial_step, SAMPLES_SEEN: 0, _MODEL: 0}),
            params=params,
            optimizers={_MODEL: self.optimizer.initial_slots(params)},
            buffers=Arena({}, self._dtype),
        )

    def check_counters(self, counters: Counters, initial_step: int) -> None:
        if counters[_MODEL] != counters.global_step - initial_step:
            raise CheckpointError(
                "counter",
                f"counters disagree: {counters[_MODEL]} updates of the model, but global step "
                f"{counters.global_step} with initial_step {initial_step}",
            )

    def increments(self, batch: Batch) -> dict[str, int]:
        return {GLOBAL_STEP: 1, SAMPLES_SEEN: len(batch.x), _MODEL: 1}

    def trial(self, state: TrainState, batch: Batch) -> None:
        self._gradient(state, batch, checked=True)
        self.optimizer.trial(self._dtype)
        self.optimizer.learning_rate(state.counters.global_step)

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        gradient, metrics = self._gradient(state, batch)
        refuse_non_finite(state.counters.global_step + 1, metrics["loss"], gradient)
        tick = Tick(self.optimizer.learning_rate(state.counters.global_step), state.counters[_MODEL] + 1)
        slots = state.optimizers[_MODEL]
        self.optimizer.update(state.params, slots, gradient, tick, threads=self._threads)
        metrics["learning_rate"] = tick.learning_rate
        return metrics

    def _gradient(self, state: TrainState, batch: Batch, *, checked: bool = False) -> tuple[Arena, Metrics]:
        if self._gradients is None:
            self._gradients = TreeSum(state.params)
        step, n = state.counters.global_step, len(batch.x)
        rows = n // self._shards
        parts = []
        for shard in range(self._shards):
            at = slice(shard * rows, (shard + 1) * rows)
            self._training.start(partial(self._rng, step, shard))
            outputs, backward = self._forward(state.params, batch.x[at], self._training)
            metrics, doutputs = self.measure(outputs, batch.y[at], n, self._training)
            leaf = self._gradients.leaf()
            if checked:
                leaf.mark()
            backward(doutputs, leaf)
            if checked and (unwritten := leaf.marked()):
                raise ConfigError(
                    f"model: backward left the gradient of {', '.join(unwritten)} unwritten; "
                    "it must write all of it: grads[name][...] = ..."
                )
            self._gradients.add()
            parts.append(metrics)
        return self._gradients.total(), _summed(parts)

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> Metrics:
        parts, n = [], 0
        for batch in batches:
            self._evaluation.start()
            outputs, _ = self._forward(state.params, batch.x, self._evaluation)
            parts.append(self.measure(outputs, batch.y, 1, self._evaluation)[0])
            n += len(batch.x)
        return {name: value / n for name, value in _summed(parts).items()}

    def _forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        outputs, backward = self.model.forward(params, x, workspace)
        if outputs.shape != (len(x), self._n_outputs):
            raise ConfigError(f"model: forward returned shape {outputs.shape}; {(len(x), self._n_outputs)} is needed")
        return outputs, backward

    def _rng(self, step: int, shard: int, name: str) -> np.random.Generator:
        return rng(self._seed, f"step/{name}", step, shard)


def _summed(parts: list[Metrics]) -> Metrics:
    # exactly rounded, so that the order of the parts does not matter
    return parts[0] if len(parts) == 1 else {name: math.fsum(part[name] for part in parts) for name in parts[0]}


@final
class Classification(Supervised):
    """Labels 0..n_classes-1 under softmax cross-entropy; one output a class."""

    targets: Targets = "classes"
    metrics = ("loss", "accuracy")

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
    metrics = ("loss", "accuracy")

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        if n_classes != 2:
            raise ConfigError(f"task.name: binary_classification needs labels 0 and 1; the data have {n_classes} "
                              "classes: use classification")  # fmt: skip
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
    metrics = ("loss",)

    @staticmethod
    def n_outputs(n_classes: int | None, target_shape: Shape) -> int:
        return target_shape[0]

    @staticmethod
    def measure(outputs: Array, y: Array, n: int, workspace: Workspace) -> tuple[Metrics, Array]:
        loss, doutputs = losses.mean_squared_error(outputs, y, n, workspace)
        return {"loss": loss}, doutputs
