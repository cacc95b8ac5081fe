"""Memory of rank 0 that every rank reads and writes by one-sided MPI communication."""

import contextlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np

from stepctl.distributed.polling import poll_until
from stepctl.state.arena import Array


class Cell(IntEnum):
    """The int64 counters at the start of a window, by their index."""

    TICKET = 0  # number of the next update to begin
    LIMIT = 1  # no update with this number or a higher one may begin
    DONE = 2  # completed updates
    QUEUE = 3  # next ticket of the lock
    SERVED = 4  # ticket that holds the lock


_ARRAYS_OFFSET = 64 * -(-8 * len(Cell) // 64)  # bytes, whole cache lines


class Window:
    """Counters and arrays in an MPI window, and a lock.

    Every operation is complete when it returns. Rank 0 must call `clear` first.
    """

    def __init__(self, window: Any, mpi_sum: Any) -> None:
        """`window` is an MPI window on `size` bytes of rank 0, displacement unit 1.

        `mpi_sum` is MPI.SUM.
        """
        self._window = window
        self._sum = mpi_sum

    @staticmethod
    def size(n_bytes: int) -> int:
        """Return the bytes of a window with `n_bytes` for arrays."""
        return _ARRAYS_OFFSET + n_bytes

    def read(self, cell: Cell) -> int:
        """Return a counter's value."""
        return self.add(cell, 0)

    def add(self, cell: Cell, n: int) -> int:
        """Add atomically to a counter; return its previous value.

        All ranks see the additions in one order.
        """
        previous = np.zeros(1, np.int64)
        self._window.Fetch_and_op(np.array([n], np.int64), previous, 0, 8 * cell, self._sum)
        self._window.Flush(0)
        return int(previous[0])

    def set(self, cell: Cell, n: int) -> None:
        """Set a counter; no other rank may change it meanwhile."""
        self.add(cell, n - self.read(cell))

    def clear(self) -> None:
        """Set all counters to 0, before another rank uses the window."""
        self._window.Put(np.zeros(len(Cell), np.int64), 0)
        self._window.Flush(0)

    def get(self, offset: int, values: Array) -> None:
        """Read a 1-D array at an offset in bytes."""
        self._window.Get(values, 0, _ARRAYS_OFFSET + offset)
        self._window.Flush(0)

    def put(self, offset: int, values: Array) -> None:
        """Write a 1-D array at an offset in bytes."""
        self._window.Put(values, 0, _ARRAYS_OFFSET + offset)
        self._window.Flush(0)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the window's lock; ranks get it in the order in which they ask (a ticket lock)."""
        # not MPI's lock: rank 0 would only grant it between two computations of its own
        ticket = self.add(Cell.QUEUE, 1)
        poll_until(lambda: self.read(Cell.SERVED) == ticket)
        try:
            yield
        finally:
            self.add(Cell.SERVED, 1)
