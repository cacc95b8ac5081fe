"""The task of a model that gives its loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, final

import numpy as np

from stepctl.data.base import NO_TARGETS, Targets
from stepctl.data.batches import Batch
from stepctl.distributed.comm import Comm
from stepctl.errors import ConfigError
from stepctl.models.base import ModelShapes
from stepctl.models.loss_model import LossModel
from stepctl.programs.base import Metrics, Mode, Predictions, sum_metrics
from stepctl.programs.learner import MODEL, Learner
from stepctl.programs.loss_gradients import LossGradients, Rows
from stepctl.programs.one_model import OneModel
from stepctl.programs.shards import ShardFunction
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.rng import NamedGenerators, rng
from stepctl.state.train_state import TrainState
from stepctl.system.user_code import defined_at


@final
class ModelLoss(OneModel):
    """The mean over the batch of the loss that a stepctl.LossModel gives each row, and its penalty.

    The data may have no targets. Gradients come from autograd, or from the model.
    """

    targets: Targets = "any"
    metrics: ClassVar[dict[str, Mode]] = {"loss": "min"}
    training_metrics = ("loss",)
    needs_targets = False
    learns_labels = False
    _model: LossGradients

    def ends(
        self, n_classes: int | None, sample_shape: Shape, target_shape: Shape
    ) -> dict[str, ModelShapes]:
        return {MODEL: ModelShapes(sample_shape, math.prod(target_shape))}

    def attach(self, learners: dict[str, Learner], comm: Comm) -> None:
        super().attach(learners, comm)
        model = self._learner.model
        assert isinstance(model, LossModel)
        self._model = LossGradients(model)

    @property
    def needs_autograd(self) -> bool:
        return self._model.needs_autograd

    def _shard_function(self, state: TrainState, batch: Batch) -> ShardFunction:
        params = self._learner.params(state)
        step = state.counters.global_step
        n = len(batch.x) * self.comm.size
        model = self._model

        def compute(shard: int, at: slice, gradient: Arena, buffers: Arena) -> Metrics:
            generators = NamedGenerators(partial(self._rng, step, shard))
            rows = Rows(batch.x[at], _targets(batch, at), generators)
            losses, gradients = model.losses_and_gradients(params, rows)
            for path, array in gradients.items():
                np.divide(array, n, out=gradient[path], casting="same_kind")
            loss = _sum(losses) / n
            if model.has_penalty and shard == 0:  # once, for the whole batch
                penalty, gradients = model.penalty_and_gradients(params)
                for path, array in gradients.items():
                    np.add(gradient[path], array, out=gradient[path], casting="same_kind")
                loss += penalty
            return {"loss": loss}

        return compute

    def evaluate(
        self, state: TrainState, batches: Iterable[Batch], *, average: bool = False
    ) -> Metrics:
        params = self._learner.params(state, average=average)
        parts: list[Metrics] = []
        n = 0
        for number, batch in enumerate(batches):
            generators = NamedGenerators(partial(self._evaluation_rng, number), training=False)
            rows = Rows(batch.x, _targets(batch, slice(None)), generators)
            parts.append({"loss": _sum(self._model.losses(params, rows))})
            n += len(batch.x)
        loss = sum_metrics(parts)["loss"] / n
        if self._model.has_penalty:
            loss += self._model.penalty(params)
        return {"loss": loss}

    def predict(self, state: TrainState, x: Array, *, average: bool = False) -> Predictions | None:
        model = self._learner.model
        assert isinstance(model, LossModel)
        if not model.defines("predict"):
            return None
        params = self._learner.params(state, average=average)
        values = np.array(model.predict(model.nested(params), x))
        if len(values.shape) == 0 or len(values) != len(x):
            raise ConfigError(
                f"model: predict returned shape {values.shape} for {len(x)} rows of x; return "
                f"({len(x)}, ...) ({defined_at(type(model))})"
            )
        return Predictions(values)

    def _evaluation_rng(self, batch: int, name: str) -> np.random.Generator:
        return rng(self._seed, f"evaluation/{name}", batch)


def _targets(batch: Batch, at: slice) -> Array | None:
    """Return the targets of some rows, None if the data have none."""
    return None if batch.y.shape[1:] == NO_TARGETS else batch.y[at]


def _sum(losses: Array) -> float:
    return float(losses.sum(dtype=np.float64))
