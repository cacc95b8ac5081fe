"""A task with one model, whose step is one update from one batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np

from stepctl.data.batches import Batch
from stepctl.programs.base import Metrics, OneUpdate, refuse_non_finite
from stepctl.programs.learner import MODEL, Learner
from stepctl.programs.shards import ShardFunction, ShardSum
from stepctl.state.arena import Arena
from stepctl.state.rng import rng
from stepctl.state.train_state import TrainState


class OneModel(OneUpdate):
    """One global step is one update of one model from one batch.

    A batch has `shards` equal parts. The gradient of a shard is its share of the gradient of the
    batch's mean loss; the shards' gradients are summed in a fixed binary tree. The new buffers are
    the mean over the shards.
    """

    divisible = True
    sliced = True
    buffered = True

    def __init__(self, *, seed: int, dtype: str, shards: int) -> None:
        self._seed = seed
        self._shards = shards
        self._shard_sum: ShardSum | None = None

    @abstractmethod
    def _shard_function(self, state: TrainState, batch: Batch) -> ShardFunction:
        """Return the function that computes one shard of the batch's gradient."""

    @property
    def _learner(self) -> Learner:
        return self.learners[MODEL]

    def trial(self, state: TrainState, batch: Batch) -> None:
        self._sum(state).trial(len(batch.x), self._shard_function(state, batch))
        self._learner.trial(state)

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        gradient, buffers, metrics = self._compute(state, batch)
        metrics |= self.apply(state, gradient, state.counters)
        state.buffers.copy_from(buffers)
        return metrics

    def gradient(self, state: TrainState, batch: Batch) -> tuple[Arena, Metrics]:
        gradient, _, metrics = self._compute(state, batch)
        return gradient, metrics

    def _compute(self, state: TrainState, batch: Batch) -> tuple[Arena, Arena, Metrics]:
        """Return gradient, new buffers and metrics; NonFiniteError if one is not finite."""
        compute = self._shard_function(state, batch)
        gradient, buffers, metrics = self._sum(state)(len(batch.x), compute)
        step = state.counters.global_step + 1
        refuse_non_finite(step, metrics["loss"], gradient, buffers=buffers)
        return gradient, buffers, metrics

    def apply(self, state: TrainState, gradient: Arena, counts: Mapping[str, int]) -> Metrics:
        return self._learner.update(state, gradient, counts)

    def _sum(self, state: TrainState) -> ShardSum:
        if self._shard_sum is None:
            params = self._learner.params(state)
            self._shard_sum = ShardSum(params, state.buffers, self._shards, self.comm, MODEL)
        return self._shard_sum

    def _rng(self, step: int, shard: int, name: str) -> np.random.Generator:
        return rng(self._seed, f"step/{name}", step, shard)
