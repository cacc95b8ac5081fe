"""Gradients, new buffers and metrics of a batch, summed over its shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from stepctl.distributed.comm import Comm
from stepctl.programs.base import Metrics, refuse_unwritten, sum_metrics
from stepctl.state.arena import Arena
from stepctl.state.tree_sum import TreeSum

# (shard, its rows in this rank's part of the batch, gradient to write, new buffers to write) -> the
# shard's share of the metrics
ShardFunction = Callable[[int, slice, Arena, Arena], Metrics]


class ShardSum:
    """A sum over the shards of a batch; each rank computes its own shards.

    The sum follows a fixed binary tree over the shards, so its bits do not depend on which rank
    computes which shard.
    """

    def __init__(self, params: Arena, buffers: Arena, shards: int, comm: Comm, model: str) -> None:
        """`params` and `buffers` give the layouts of the sums; `model` is its name in messages."""
        self._layouts = (params, buffers)
        self._shards = shards
        self._comm = comm
        self._model = model
        self._mine = comm.mine(shards)
        self._metric_names: tuple[str, ...] = ()

    @cached_property
    def _trees(self) -> list[TreeSum]:
        # created at the first step, which all ranks make together; no exchange for an empty layout
        return [
            self._comm.tree_sum(layout, self._shards) if layout else TreeSum(layout)
            for layout in self._layouts
        ]

    def __call__(self, rows: int, compute: ShardFunction) -> tuple[Arena, Arena, Metrics]:
        """Return gradient, new buffers and metrics of a batch; `rows` is this rank's part of it.

        The gradient is complete in the part of the parameters that this rank updates. The new
        buffers are the mean over the shards. Both arenas are valid until the next call; between two
        calls all ranks must synchronize, as an update does. An error on one rank is raised on all,
        and the next call starts from zero.
        """
        trees = self._trees
        metrics: list[Metrics] = []
        error: Exception | None = None
        try:
            for shard, at in self._slices(rows):
                gradient, buffers = (tree.leaf() for tree in trees)
                metrics.append(compute(shard, at, gradient, buffers))
                for tree in trees:
                    tree.add()
            self._metric_names = self._metric_names or tuple(metrics[0])
        except Exception as caught:
            error = caught  # raised below, by all ranks
        except BaseException:
            self._drop()
            raise
        try:
            metrics = self._comm.gather_metrics(metrics, self._metric_names, len(self._mine), error)
        except BaseException:
            self._drop()
            raise
        gradient, buffers = (tree.total() for tree in trees)
        np.divide(buffers.flat, self._shards, out=buffers.flat)
        return gradient, buffers, sum_metrics(metrics)

    def _drop(self) -> None:
        for tree in self._trees:
            tree.reset()

    def trial(self, rows: int, compute: ShardFunction) -> None:
        """Compute this rank's shards, without a sum.

        Raises ConfigError if a gradient or a new buffer is left unwritten.
        """
        gradient, buffers = (layout.like() for layout in self._layouts)
        for shard, at in self._slices(rows):
            gradient.fill_sentinel()
            buffers.fill_sentinel()
            self._metric_names = tuple(compute(shard, at, gradient, buffers))
            refuse_unwritten(gradient, buffers, self._model)

    def _slices(self, rows: int) -> list[tuple[int, slice]]:
        """Return (shard, its rows) for each of this rank's shards."""
        size = rows // len(self._mine)
        return [(shard, slice(i * size, (i + 1) * size)) for i, shard in enumerate(self._mine)]
