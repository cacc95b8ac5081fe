"""Training state in memory that all ranks of a job on one host share; each rank updates its part.

A rank changes the state only between two barriers: one at the start of an update and one at its
end. Outside of an update the state is therefore complete, even when a rank fails or waits in a
barrier. Inside an update, a rank that fails cannot tell what the other ranks have changed.
"""

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from stepctl.distributed.comm import Comm
from stepctl.errors import StepctlError, TornUpdate
from stepctl.state.arena import PARTITION_BLOCK, Arena, Array, Partition

Wait = Callable[[Any], None]  # waits for an MPI request
FileIdentity = tuple[str, int, int]  # path of another process's unnamed file, device and inode
_PAGE_BYTES = 4096
_FILE_SYSTEM = "/dev/shm"  # it has a size limit: an allocation fails before memory runs out


def padded_n_bytes(layout: Arena) -> int:
    """Return the bytes of an arena, rounded up to whole pages."""
    return max(-(-layout.n_bytes // _PAGE_BYTES), 1) * _PAGE_BYTES


def arenas_in(memory: Array, layout: Arena) -> list[Array]:
    """Return the buffers of arenas of one layout that lie one after another in memory."""
    width = padded_n_bytes(layout)
    n_arenas = len(memory) // width
    rows = memory[: n_arenas * width].reshape(-1, width)
    return [row[: layout.n_bytes].view(layout.dtype) for row in rows]


def n_bytes(arenas: Sequence[Arena]) -> int:
    """Return the bytes of shared memory for arenas: two buffers each, for updates during a save."""
    return 2 * sum(padded_n_bytes(arena) for arena in arenas)


def allocate(n_bytes: int, comm: Comm) -> Array | None:
    """Return zeros that all ranks share, uint8; None if a rank cannot. A collective call.

    The kernel frees the memory with the last rank.
    """
    # not MPI's shared memory: MPICH leaves it behind when a job is killed
    descriptor = _create_file(n_bytes) if comm.rank == 0 else None
    identity = None
    if descriptor is not None:
        status = os.fstat(descriptor)
        identity = (f"/proc/{os.getpid()}/fd/{descriptor}", status.st_dev, status.st_ino)
    identity = comm.broadcast(identity)
    memory = None if identity is None else _map_file(identity, n_bytes)
    mapped_everywhere = all(comm.all_gather(memory is not None))
    if descriptor is not None:
        os.close(descriptor)
    return memory if mapped_everywhere else None


def _create_file(n_bytes: int) -> int | None:
    """Return the descriptor of an unnamed file of zeros in memory; None if it cannot be created."""
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.open(_FILE_SYSTEM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        # reserve all pages now: a process that later touches a page without memory is killed
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _map_file(identity: FileIdentity, n_bytes: int) -> Array | None:
    """Return the bytes of an unnamed file of another process; None if it cannot be mapped."""
    try:
        # in a container, the same pid may be another process
        path, device, inode = identity
        status = os.stat(path)
        if (status.st_dev, status.st_ino) != (device, inode):
            return None
        with open(path, "r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), n_bytes), np.uint8)
    except (OSError, ValueError):
        return None


class RankPartition(Partition):
    """Each rank of an MPI communicator updates an about equal part of every arena."""

    def __init__(self, comm: Any, wait: Wait, in_place: Any) -> None:
        """`wait` waits for an MPI request of `comm`; `in_place` is MPI.IN_PLACE."""
        self._comm = comm
        self._wait = wait
        self._in_place = in_place

    def owned_slice(self, n: int) -> slice:
        width = PARTITION_BLOCK * self._blocks_per_rank(n)
        start = min(int(self._comm.rank) * width, n)
        return slice(start, min(start + width, n))

    def _blocks_per_rank(self, n: int) -> int:
        """Return the number of blocks of each rank; the last ranks may have fewer."""
        return -(-n // (PARTITION_BLOCK * int(self._comm.size)))

    def minimum(self, number: int) -> int:
        numbers = np.full(self._comm.size, number)
        self._wait(self._comm.Iallgather(self._in_place, numbers))
        return int(numbers.min())

    def map_blocks(self, function: Callable[[Array], float], flat: Array) -> list[float]:
        width = self._blocks_per_rank(len(flat))
        n_blocks = -(-len(flat) // PARTITION_BLOCK)
        counts = [min(width, max(n_blocks - rank * width, 0)) for rank in range(self._comm.size)]
        offsets = [0, *accumulate(counts[:-1])]
        values = np.zeros(n_blocks)
        start = offsets[self._comm.rank]
        own_values = super().map_blocks(function, flat[self.owned_slice(len(flat))])
        values[start : start + len(own_values)] = own_values
        self._wait(self._comm.Iallgatherv(self._in_place, [values, (counts, offsets)]))
        return values.tolist()

    @contextlib.contextmanager
    def synchronized_update(self) -> Iterator[None]:
        try:
            self.barrier()
            yield
            self.barrier()
        except TornUpdate:
            raise
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            kind = "" if isinstance(error, StepctlError) else f"{type(error).__name__}: "
            raise TornUpdate(f"{kind}{error}") from error

    def barrier(self) -> None:
        """Wait for all ranks; each then sees the earlier writes of the others."""
        self._wait(self._comm.Ibarrier())

    def move_arenas(self, arenas: Sequence[Arena], memory: Array) -> None:
        """Move arenas to shared memory of `n_bytes(arenas)`, with rank 0's values.

        A collective call.
        """
        start = 0
        for arena in arenas:
            end = start + 2 * padded_n_bytes(arena)
            buffer, spare = arenas_in(memory[start:end], arena)
            if self._comm.rank == 0:
                buffer[:] = arena.flat
            arena.move_to(buffer, spare, self)
            start = end
        self.barrier()
