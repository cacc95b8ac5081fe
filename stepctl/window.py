"""Memory of rank 0 that every rank of a job reads and writes on its own, without the others' help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np

from stepctl.arena import Array
from stepctl.comm import until


class Cell(IntEnum):
    """Whole numbers at the window's beginning."""

    TICKET = 0  # the next update that nobody has begun
    LIMIT = 1  # from which on none is to be begun
    DONE = 2  # updates that are complete
    QUEUE = 3  # the next place in the queue for the window
    SERVED = 4  # whose turn it is


_START = 64 * -(-8 * len(Cell) // 64)  # bytes, whole cache lines


class Window:
    """Numbers and arrays in an MPI window (one-sided communication); `exclusive` keeps the other ranks out.

    Every operation is complete when it returns. Rank 0 must `clear` it first.
    """

    def __init__(self, window: Any, addition: Any) -> None:
        """`window` is MPI's, of `size` bytes of rank 0's and displacement unit 1; `addition` is MPI's operation."""
        self._window, self._addition = window, addition

    @staticmethod
    def size(n_bytes: int) -> int:
        """Return the bytes that the memory takes of which so many are for arrays."""
        return _START + n_bytes

    def add(self, cell: Cell, n: int = 0) -> int:
        """Add to a number; return what it was before. All ranks see one order of such additions."""
        found = np.zeros(1, np.int64)
        self._window.Fetch_and_op(np.array([n], np.int64), found, 0, 8 * cell, self._addition)
        self._window.Flush(0)
        return int(found[0])

    def set(self, cell: Cell, n: int) -> None:
        """Set a number that nobody else sets."""
        self.add(cell, n - self.add(cell))

    def clear(self) -> None:
        """Set every number to 0, before anybody else uses the window."""
        self._window.Put(np.zeros(len(Cell), np.int64), 0)
        self._window.Flush(0)

    def get(self, place: int, values: Array) -> None:
        """Fetch a 1-D array from its place, in bytes."""
        self._window.Get(values, 0, _START + place)
        self._window.Flush(0)

    def put(self, place: int, values: Array) -> None:
        """Write a 1-D array to its place, in bytes."""
        self._window.Put(values, 0, _START + place)
        self._window.Flush(0)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep the other ranks out, first come, first served."""
        # not MPI's own lock: rank 0 could only grant it between two computations of its own
        number = self.add(Cell.QUEUE, 1)
        until(lambda: self.add(Cell.SERVED) == number)
        try:
            yield
        finally:
            self.add(Cell.SERVED, 1)
