"""The state of a job on one host: in memory that all its ranks share, and of which each updates a part.

A rank changes it only between two meetings of all, an update's beginning and its end. So outside of these the state is
whole, whatever a rank fails in, and nobody can change it while another waits to meet. Inside, one that fails, or hears
of one that does, cannot tell what the others have changed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from stepctl.arena import GRAIN, Arena, Array, Owners
from stepctl.errors import StepctlError, TornUpdate

Wait = Callable[[Any], None]
_PAGE = 4096  # bytes
_MEMORY = "/dev/shm"  # which has a size: what were taken beyond all memory would end processes


def padded(layout: Arena) -> int:
    """Return the bytes of the whole pages that an arena takes."""
    return max(-(-layout.n_bytes // _PAGE), 1) * _PAGE


def arenas_in(memory: Array, layout: Arena) -> list[Array]:
    """Return the buffers of this layout that lie in a row in memory."""
    rows = memory[: len(memory) // padded(layout) * padded(layout)].reshape(-1, padded(layout))
    return [row[: layout.n_bytes].view(layout.dtype) for row in rows]


def n_bytes(arenas: Sequence[Arena]) -> int:
    """Return what arenas take of shared memory: each twice, as while it is saved the next update goes elsewhere."""
    return 2 * sum(map(padded, arenas))


def memory(n_bytes: int, rank: int, share: Callable[[Any], Any], collect: Callable[[Any], list[Any]]) -> Array | None:
    """Return memory of zeros that all ranks share, None where there is none; it is gone with the last of them.

    `share` gives rank 0's value to all, `collect` all ranks' values.
    """
    # not MPI's own: MPICH leaves it behind when a job is killed
    descriptor = _created(n_bytes) if rank == 0 else None
    place = share(None if descriptor is None else _place(f"/proc/{os.getpid()}/fd/{descriptor}", os.fstat(descriptor)))
    found = None if place is None else _mapped(place, n_bytes)
    everywhere = all(collect(found is not None))
    if descriptor is not None:
        os.close(descriptor)
    return found if everywhere else None


class Place(NamedTuple):
    """Where other processes of a host find a file that has no name, and what tells them that it is this one."""

    path: str
    device: int
    inode: int


def _place(path: str, status: os.stat_result) -> Place:
    return Place(path, status.st_dev, status.st_ino)


def _created(n_bytes: int) -> int | None:
    """Open a file of zeros in memory, for other processes to map too; None if that fails."""
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.open(_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)  # now: a process that touches more than there is later is killed
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _mapped(place: Place, n_bytes: int) -> Array | None:
    """Return the bytes of such a file, which may be closed then; None if that fails."""
    try:
        if _place(place.path, os.stat(place.path)) != place:  # in a container, processes have other numbers
            return None
        with open(place.path, "r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), n_bytes), np.uint8)
    except (OSError, ValueError):
        return None


class RankOwners(Owners):
    """The ranks of an MPI communicator, each of about an equal part of every arena."""

    def __init__(self, comm: Any, wait: Wait, in_place: Any) -> None:
        """`wait` waits for a request of MPI's."""
        self._comm, self._wait, self._in_place = comm, wait, in_place

    def part(self, n: int) -> slice:
        width, rank = GRAIN * self._width(n), int(self._comm.rank)
        start = min(rank * width, n)
        return slice(start, min(start + width, n))

    def _width(self, n: int) -> int:
        """Return how many blocks are in the part of each rank, but for the last ones."""
        return -(-n // (GRAIN * int(self._comm.size)))

    def least(self, number: int) -> int:
        found = np.full(self._comm.size, number)
        self._wait(self._comm.Iallgather(self._in_place, found))
        return int(found.min())

    def over_blocks(self, flat: Array, value: Callable[[Array], float]) -> list[float]:
        width, blocks = self._width(len(flat)), -(-len(flat) // GRAIN)
        counts = [min(width, max(blocks - rank * width, 0)) for rank in range(self._comm.size)]
        starts = [0, *accumulate(counts[:-1])]
        found, rank = np.zeros(blocks), self._comm.rank
        found[starts[rank] : starts[rank] + counts[rank]] = super().over_blocks(flat[self.part(len(flat))], value)
        self._wait(self._comm.Iallgatherv(self._in_place, [found, (counts, starts)]))
        return found.tolist()

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        try:
            self.meet()
            yield
            self.meet()
        except TornUpdate:
            raise
        except (Exception, SystemExit) as error:  # a user's own code may raise anything
            kind = "" if isinstance(error, StepctlError) else f"{type(error).__name__}: "
            raise TornUpdate(f"{kind}{error}") from error

    def meet(self) -> None:
        """Wait for all ranks; then each sees what the others wrote before."""
        self._wait(self._comm.Ibarrier())

    def take(self, arenas: Sequence[Arena], memory: Array) -> None:
        """Move arenas to shared memory, of `n_bytes`, with the values that they have in rank 0."""
        start = 0
        for arena in arenas:
            end = start + 2 * padded(arena)
            present, spare = arenas_in(memory[start:end], arena)
            if self._comm.rank == 0:
                present[:] = arena.flat
            arena.move(present, spare, self)
            start = end
        self.meet()
