"""The sum of a step's gradients over the ranks of a job, with the bits that one process alone gets.

Each rank sums its whole subtrees of the tree over all shards. Then every rank owns a slice of the flat arena: it goes
on with the tree on that slice, from where all ranks' subtrees end (a reduce-scatter). Where the ranks share the
parameters, the slice is the part that this rank updates, read from the others' arenas where they are; no rank needs
more. Where they do not, slices are sent, straight from and into the arenas, and all get all of them (an all-gather).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from stepctl.arena import ALIGNMENT, Arena, Array, Fold, TreeSum, aligned_empty
from stepctl.shared import Wait, arenas_in, padded


def subtrees(leaves: range) -> list[tuple[int, int]]:
    """Return the whole subtrees, (height, first leaf), that a run of the tree's leaves falls into, in order."""
    fold: Fold[None] = Fold(lambda left, right: None)
    for leaf in leaves:
        fold.push(0, leaf, None)
    return [(height, first) for height, first, _ in fold.take()]


def bounds(n: int, parts: int, itemsize: int) -> list[int]:
    """Return where each of so many parts of n elements begins, and n: about equal, on cache lines."""
    line = ALIGNMENT // itemsize
    width = -(-n // (parts * line)) * line
    return [min(part * width, n) for part in range(parts + 1)]


def reduce(summands: Sequence[tuple[int, int, Array]], out: Array) -> None:
    """Write the tree's sum of its subtrees' (height, first leaf, values) into `out`; the summands are used up."""
    sums: list[tuple[Array, Array]] = []

    def later(left: Array, right: Array) -> Array:
        sums.append((left, right))
        return left

    fold = Fold(later)
    for height, first, values in summands:
        fold.push(height, first, values)
    fold.total()
    for left, right in sums[:-1]:
        np.add(left, right, out=left)
    np.add(*sums[-1], out=out)


class ExchangedSum(TreeSum):
    """A tree's sum of arenas to which each rank of an MPI communicator adds the leaves that are its own."""

    def __init__(self, layout: Arena, rank: int, leaves: list[range], mine: slice) -> None:
        """`leaves` is what each rank adds, `mine` the slice that this rank owns."""
        self._rank, self._mine = rank, mine
        super().__init__(layout, leaves[rank].start)
        self._subtrees = [subtrees(of) for of in leaves]

    def total(self) -> Arena:
        """Return the sum of every rank's summands, in `layout.part`.

        All must have added theirs: a `gather` comes before.
        """
        arenas = [arena for _, _, arena in self._fold.take()]
        slices = self._scattered(arenas)
        found = zip(self._subtrees, slices, strict=True)
        reduce(
            [(*place, values) for places, of in found for place, values in zip(places, of, strict=True)],
            arenas[0].flat[self._mine],
        )
        self._complete(arenas[0])
        self._free += arenas
        self._begin()
        return arenas[0]

    @abstractmethod
    def _scattered(self, arenas: list[Arena]) -> list[list[Array]]:
        """Return by rank this rank's slice of its subtrees."""

    @abstractmethod
    def _complete(self, total: Arena) -> None:
        """Fetch what this rank needs of the other ranks' slices of the total."""


class MessagedSum(ExchangedSum):
    """The exchange by messages: over any network."""

    def __init__(self, layout: Arena, comm: Any, leaves: list[range], wait: Wait, in_place: Any) -> None:
        """`wait` waits for a request of MPI's."""
        edges = bounds(len(layout.flat), comm.size, layout.dtype.itemsize)
        self._slices = [slice(start, end) for start, end in pairwise(edges)]
        super().__init__(layout, comm.rank, leaves, self._slices[comm.rank])
        self._comm, self._wait, self._in_place = comm, wait, in_place
        self._counts, self._starts = [at.stop - at.start for at in self._slices], [at.start for at in self._slices]
        rounds = max(map(len, self._subtrees))
        # (round, rank, elements)
        self._received = aligned_empty((rounds, comm.size, self._counts[self._rank]), layout.dtype)

    def _scattered(self, arenas: list[Arena]) -> list[list[Array]]:
        for number in range(len(self._received)):
            self._send(number, arenas)
        found = [list(self._received[: len(of), rank]) for rank, of in enumerate(self._subtrees)]
        found[self._rank] = [arena.flat[self._mine] for arena in arenas]
        return found

    def _send(self, number: int, arenas: list[Arena]) -> None:
        """Send the slices of this rank's so-manieth subtree to their owners; receive theirs of this one's."""
        sends, ranks = number < len(arenas), range(len(self._slices))
        sent = [self._counts[rank] if sends and rank != self._rank else 0 for rank in ranks]
        width, received = self._counts[self._rank], self._received[number]
        got = [width if number < len(self._subtrees[rank]) and rank != self._rank else 0 for rank in ranks]
        values = arenas[number].flat if sends else received.reshape(-1)  # of which nothing is sent
        places = [rank * width for rank in ranks]
        self._wait(self._comm.Ialltoallv([values, (sent, self._starts)], [received, (got, places)]))

    def _complete(self, total: Arena) -> None:
        self._wait(self._comm.Iallgatherv(self._in_place, [total.flat, (self._counts, self._starts)]))


class SharedSum(ExchangedSum):
    """The exchange through memory that all ranks share: for parameters of which each rank updates its part."""

    def __init__(self, layout: Arena, rank: int, leaves: list[range], memory: Array) -> None:
        """`memory` is shared: of each rank `n_bytes(layout, leaves)`."""
        super().__init__(layout, rank, leaves, layout.part)
        self._made = 0
        self._numbers = [_places(of)[0] for of in leaves]  # by rank, the arena that each of its subtrees ends in
        self._peers = [self._arenas(layout, part) for part in np.split(memory, len(leaves))]

    @staticmethod
    def n_bytes(layout: Arena, leaves: list[range]) -> int:
        """Return what each rank needs of shared memory."""
        return max(_places(of)[1] for of in leaves) * padded(layout)

    @staticmethod
    def _arenas(layout: Arena, memory: Array) -> list[Arena]:
        found = [layout.like(flat) for flat in arenas_in(memory, layout)]
        for arena in found:
            arena.owners = layout.owners
        return found

    def _new(self) -> Arena:
        self._made += 1
        return self._peers[self._rank][self._made - 1]

    def _begin(self) -> None:
        # so that the arenas are taken in the same order at every step
        super()._begin()
        self._free, self._made = [], 0

    def _scattered(self, arenas: list[Arena]) -> list[list[Array]]:
        return [
            [peer[number].flat[self._mine] for number in numbers]
            for peer, numbers in zip(self._peers, self._numbers, strict=True)
        ]

    def _complete(self, total: Arena) -> None:
        """Nothing: the other ranks update with theirs."""


def _places(leaves: range) -> tuple[list[int], int]:
    """Return the numbers of the arenas that a TreeSum has its subtrees in at last, and how many it uses."""
    free: list[int] = []
    made = 0

    def join(left: int, right: int) -> int:
        free.append(right)
        return left

    fold = Fold(join)
    for leaf in leaves:
        if not free:
            free.append(made)
            made += 1
        fold.push(0, leaf, free.pop())
    return [number for _, _, number in fold.take()], made
