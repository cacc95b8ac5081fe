"""The sum of a batch's gradients over its shards, and the mean of what each makes of the buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from stepctl.arena import Arena, TreeSum
from stepctl.comm import Comm
from stepctl.tasks.base import Metrics, refuse_unwritten, summed

# (shard, its rows in this process's part of the batch, where its gradient goes, and its new buffers) -> its share of
# the metrics
Part = Callable[[int, slice, Arena, Arena], Metrics]


class ShardSum:
    """Gradients, buffers and metrics, computed shard by shard and summed, each by the process that it belongs to.

    The order of the sum is a fixed binary tree over the shards, so that it does not matter which process that is.
    """

    def __init__(self, params: Arena, buffers: Arena, shards: int, comm: Comm, whose: str) -> None:
        self._layouts, self._shards, self._comm, self._whose = (params, buffers), shards, comm, whose
        self._mine = comm.mine(shards)
        self._names: tuple[str, ...] = ()

    @cached_property
    def _trees(self) -> list[TreeSum]:
        # made at the first step, which all processes make together; of no arrays there is nothing to exchange
        return [self._comm.tree_sum(layout, self._shards) if layout else TreeSum(layout) for layout in self._layouts]

    def __call__(self, rows: int, part: Part) -> tuple[Arena, Arena, Metrics]:
        """Return gradient, new buffers and metrics of a batch of which this process has so many rows.

        The gradient is whole in the part of the parameters that this process updates. The buffers are the mean of what
        each shard's part writes. Both arenas are valid until the next call, before which all processes must meet, as
        an update does. Where it fails in one process it fails in all, and the next call begins anew.
        """
        parts: list[Metrics] = []
        trees, error = self._trees, None
        try:
            for shard, at in self._parts(rows):
                gradient, buffers = (tree.leaf() for tree in trees)
                parts.append(part(shard, at, gradient, buffers))
                for tree in trees:
                    tree.add()
            self._names = self._names or tuple(parts[0])
        except Exception as found:
            error = found
        except BaseException:
            self._drop()
            raise
        try:
            parts = self._comm.gather(parts, self._names, len(self._mine), error)
        except BaseException:
            self._drop()
            raise
        gradient, buffers = (tree.total() for tree in trees)
        np.divide(buffers.flat, self._shards, out=buffers.flat)
        return gradient, buffers, summed(parts)

    def _drop(self) -> None:
        for tree in self._trees:
            tree.drop()

    def trial(self, rows: int, part: Part) -> None:
        """Compute this process's parts and sum nothing; ConfigError if a gradient or a buffer is not written whole."""
        gradient, buffers = (layout.like() for layout in self._layouts)
        for shard, at in self._parts(rows):
            gradient.mark()
            buffers.mark()
            self._names = tuple(part(shard, at, gradient, buffers))
            refuse_unwritten(gradient, buffers, self._whose)

    def _parts(self, rows: int) -> list[tuple[int, slice]]:
        each = rows // len(self._mine)
        return [(shard, slice(i * each, (i + 1) * each)) for i, shard in enumerate(self._mine)]
