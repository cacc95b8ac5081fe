"""The sum of a step's gradients over the ranks of a job, with the same bits as on one rank.

Each rank adds its own shards, as far as they are whole subtrees of the tree over all shards. Then
each rank owns a slice of the flat arena, and adds all ranks' subtrees on that slice (a
reduce-scatter). If the ranks share the parameters in memory, the slice is the part that the rank
updates: it is read from the other ranks' buffers, and no rank needs more. Otherwise slices are
sent, from and into the arenas without a copy, and each rank receives the whole sum (an all-gather).
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from stepctl.distributed.shared_memory import Wait, arenas_in, padded_n_bytes
from stepctl.state.arena import ALIGNMENT, Arena, Array, aligned_empty
from stepctl.state.tree_sum import Fold, Subtree, TreeSum


def dry_run(leaves: range) -> TreeSum:
    """Return a sum of empty arenas, to learn which partial sums and buffers a real one has."""
    tree = TreeSum(Arena({}, np.float32), leaves.start)
    for _ in leaves:
        tree.leaf()
        tree.add()
    return tree


def slice_bounds(n: int, parts: int, itemsize: int) -> list[int]:
    """Return (parts + 1) bounds of about equal parts of n elements, on cache lines."""
    line = ALIGNMENT // itemsize
    width = -(-n // (parts * line)) * line
    return [min(part * width, n) for part in range(parts + 1)]


def add_subtrees(subtrees: Sequence[Subtree[Array]], out: Array) -> None:
    """Write the sum of subtrees in the tree's order into `out`, overwriting their values."""
    additions: list[tuple[Array, Array]] = []

    def defer(left: Array, right: Array) -> Array:
        additions.append((left, right))
        return left

    fold = Fold(defer)
    for subtree in subtrees:
        fold.push(*subtree)
    fold.root()
    *inner, root = additions
    for left, right in inner:
        np.add(left, right, out=left)
    np.add(*root, out=out)


class RankTreeSum(TreeSum):
    """A TreeSum over the shards of all ranks; each rank adds its own.

    All ranks must have added theirs before one calls `total`, and it is a collective call.
    """

    def __init__(
        self,
        layout: Arena,
        rank: int,
        leaves: list[range],
        owned: slice,
        buffers: Sequence[Arena] | None = None,
    ) -> None:
        """`leaves` are the shards of each rank, `owned` is this rank's slice of the total."""
        super().__init__(layout, leaves[rank].start, buffers)
        self._rank = rank
        self._owned = owned
        self._subtrees = [dry_run(rank_leaves).partial_sums() for rank_leaves in leaves]

    def total(self) -> Arena:
        """Return the sum of all ranks' summands, in `layout.owned_slice`."""
        own_sums = [self._buffers[subtree.value] for subtree in self.partial_sums()]
        total = own_sums[0]
        slices = self._exchange_slices(own_sums)
        summands = []
        for subtrees, rank_slices in zip(self._subtrees, slices, strict=True):
            for subtree, values in zip(subtrees, rank_slices, strict=True):
                summands.append(Subtree(subtree.height, subtree.first_leaf, values))
        add_subtrees(summands, total.flat[self._owned])
        self._gather_total(total)
        self.reset()
        return total

    @abstractmethod
    def _exchange_slices(self, own_sums: list[Arena]) -> list[list[Array]]:
        """Return this rank's slice of the partial sums of each rank."""

    @abstractmethod
    def _gather_total(self, total: Arena) -> None:
        """Fetch the slices of the total that this rank needs from the other ranks."""


class MessageTreeSum(RankTreeSum):
    """Exchanges slices in MPI messages, over any network."""

    def __init__(
        self, layout: Arena, comm: Any, leaves: list[range], wait: Wait, in_place: Any
    ) -> None:
        """`wait` waits for an MPI request; `in_place` is MPI.IN_PLACE."""
        bounds = slice_bounds(len(layout.flat), comm.size, layout.dtype.itemsize)
        slices = [slice(start, end) for start, end in pairwise(bounds)]
        super().__init__(layout, comm.rank, leaves, slices[comm.rank])
        self._comm = comm
        self._wait = wait
        self._in_place = in_place
        self._counts = [end - start for start, end in pairwise(bounds)]
        self._offsets = bounds[:-1]
        n_rounds = max(len(subtrees) for subtrees in self._subtrees)
        # (round, rank, elements)
        self._received = aligned_empty((n_rounds, comm.size, self._counts[comm.rank]), layout.dtype)

    def _exchange_slices(self, own_sums: list[Arena]) -> list[list[Array]]:
        for k in range(len(self._received)):
            self._exchange_subtree(k, own_sums)
        slices = [
            list(self._received[: len(subtrees), rank])
            for rank, subtrees in enumerate(self._subtrees)
        ]
        slices[self._rank] = [arena.flat[self._owned] for arena in own_sums]
        return slices

    def _exchange_subtree(self, k: int, own_sums: list[Arena]) -> None:
        """Send the slices of this rank's k-th subtree; receive this rank's slice of the others'."""
        n_ranks = len(self._counts)
        received = self._received[k]
        width = self._counts[self._rank]
        send_counts = [0] * n_ranks
        send_values = received.reshape(-1)  # without a k-th subtree, any array will do
        if k < len(own_sums):
            send_counts = list(self._counts)
            send_values = own_sums[k].flat
        receive_counts = [width if k < len(subtrees) else 0 for subtrees in self._subtrees]
        send_counts[self._rank] = 0
        receive_counts[self._rank] = 0
        receive_offsets = [rank * width for rank in range(n_ranks)]
        request = self._comm.Ialltoallv(
            [send_values, (send_counts, self._offsets)],
            [received, (receive_counts, receive_offsets)],
        )
        self._wait(request)

    def _gather_total(self, total: Arena) -> None:
        blocks = [total.flat, (self._counts, self._offsets)]
        self._wait(self._comm.Iallgatherv(self._in_place, blocks))


class SharedMemoryTreeSum(RankTreeSum):
    """Reads slices from the other ranks' buffers in shared memory.

    Each rank then updates its slice of the parameters.
    """

    def __init__(self, layout: Arena, rank: int, leaves: list[range], memory: Array) -> None:
        """`memory` is shared by the ranks: `n_bytes(layout, leaves)` for each."""
        self._buffers_by_rank = [
            [layout.like(flat, layout.partition) for flat in arenas_in(part, layout)]
            for part in np.split(memory, len(leaves))
        ]
        super().__init__(layout, rank, leaves, layout.owned_slice, self._buffers_by_rank[rank])

    @staticmethod
    def n_bytes(layout: Arena, leaves: list[range]) -> int:
        """Return the bytes that each rank needs."""
        n_buffers = max(dry_run(rank_leaves).n_buffers for rank_leaves in leaves)
        return n_buffers * padded_n_bytes(layout)

    def _exchange_slices(self, own_sums: list[Arena]) -> list[list[Array]]:
        return [
            [buffers[subtree.value].flat[self._owned] for subtree in subtrees]
            for buffers, subtrees in zip(self._buffers_by_rank, self._subtrees, strict=True)
        ]

    def _gather_total(self, total: Arena) -> None:
        """Do nothing: the other ranks update their own slices."""
