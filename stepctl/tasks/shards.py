"""The sum of a batch's gradients over its shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from stepctl.arena import Arena, TreeSum
from stepctl.comm import Comm
from stepctl.tasks.base import Metrics, refuse_unwritten, summed

# (shard, its rows in this process's part of the batch, where its gradient goes) -> its share of the metrics
Part = Callable[[int, slice, Arena], Metrics]


class ShardSum:
    """Gradients and metrics, computed shard by shard and summed, each shard by the process that it belongs to.

    The order of the sum is a fixed binary tree over the shards, so that it does not matter which process that is.
    """

    def __init__(self, layout: Arena, shards: int, comm: Comm, whose: str) -> None:
        self._layout, self._shards, self._comm, self._whose = layout, shards, comm, whose
        self._mine = comm.mine(shards)
        self._names: tuple[str, ...] = ()

    @cached_property
    def _tree(self) -> TreeSum:
        # made at the first step, which all processes make together
        return self._comm.tree_sum(self._layout, self._shards)

    def __call__(self, rows: int, part: Part) -> tuple[Arena, Metrics]:
        """Return gradient and metrics of a batch of which this process has so many rows.

        Where it fails in one process it fails in all, and the next call begins anew.
        """
        parts: list[Metrics] = []
        tree, error = self._tree, None
        try:
            for shard, at in self._parts(rows):
                parts.append(part(shard, at, tree.leaf()))
                tree.add()
            self._names = self._names or tuple(parts[0])
        except Exception as found:
            error = found
        try:
            parts = self._comm.gather(parts, self._names, len(self._mine), error)
        except Exception:
            tree.drop()
            raise
        return tree.total(), summed(parts)

    def trial(self, rows: int, part: Part) -> None:
        """Compute this process's parts and sum nothing; ConfigError if a gradient is not written whole."""
        leaf = self._layout.like()
        for shard, at in self._parts(rows):
            leaf.mark()
            self._names = tuple(part(shard, at, leaf))
            refuse_unwritten(leaf, self._whose)

    def _parts(self, rows: int) -> list[tuple[int, slice]]:
        each = rows // len(self._mine)
        return [(shard, slice(i * each, (i + 1) * each)) for i, shard in enumerate(self._mine)]
