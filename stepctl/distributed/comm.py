"""The communicator between the processes of a job; here is the one for a single process.

`stepctl.distributed.mpi` has the one for the ranks of an MPI job.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from stepctl.distributed import launcher
from stepctl.errors import ConfigError

if TYPE_CHECKING:
    from stepctl.state.arena import Arena, Array
    from stepctl.state.tree_sum import TreeSum


class Order(IntEnum):
    """An order that rank 0 broadcasts to the other ranks, together with an integer."""

    END = 0  # exit; the integer is the exit code
    PIN = 1  # pin BLAS to this number of threads
    TRAIN = 2  # build the run and receive rank 0's state
    STEP = 3  # make one step; 1 if the buffers of shared arenas are being saved, else 0


class ReportedByRankZero(ConfigError):
    """A configuration error that all ranks raise and rank 0 reports."""


class Comm:
    """The communicator of one process: rank 0 of 1.

    Its collective methods must be called by all ranks in the same order.
    """

    rank: int = 0
    size: int = 1
    ranks_sharing_cores: int = 1  # ranks with this rank's CPU affinity, itself included

    def mine(self, shards: int) -> range:
        """Return the shards that this rank computes, an equal part of all."""
        return self.shards_by_rank(shards)[self.rank]

    def shards_by_rank(self, shards: int) -> list[range]:
        """Return the shards that each rank computes."""
        count = shards // self.size
        return [range(rank * count, (rank + 1) * count) for rank in range(self.size)]

    def check_shards(self, shards: int) -> None:
        """Raise ConfigError if the number of shards is not a multiple of the number of ranks."""
        if shards % self.size == 0:
            return
        divisors = ", ".join(str(n) for n in range(1, shards + 1) if shards % n == 0)
        raise ConfigError(
            f"data.shards: {shards} shards cannot be divided evenly among {self.size} processes; start as "
            f"many processes as divide {shards} ({divisors}), or start a new run with data.shards a "
            f"multiple of {self.size}"
        )

    def share_arenas(self, arenas: Sequence[Arena]) -> bool:
        """Move arenas to memory that all ranks share; return whether this was possible.

        They get rank 0's values, and each rank updates its slice of them.
        """
        return False

    def tree_sum(self, layout: Arena, shards: int) -> TreeSum:
        """Return a sum over all shards; each rank adds its own.

        The total is in `layout.owned_slice`.
        """
        from stepctl.state.tree_sum import TreeSum

        return TreeSum(layout)

    def gather_metrics(
        self,
        metrics: list[dict[str, float]],
        names: Sequence[str],
        shards: int,
        error: Exception | None,
    ) -> list[dict[str, float]]:
        """Return the metrics of all shards in order; each rank gives `names` for `shards` of them.

        A rank that failed gives its `error` instead. Then it raises this error, and the other ranks
        a RankError (a NonFiniteError if the error is one).
        """
        if error is not None:
            raise error
        return metrics

    def send_order(self, order: Order, value: int = 0) -> None:
        """Broadcast an order from rank 0."""

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's value, a small picklable object."""
        return value

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, small picklable objects, by rank."""
        return [value]

    def broadcast_array(self, values: Array) -> None:
        """Overwrite a 1-D array with rank 0's values."""

    def finalize(self, exit_code: int, *, failed: bool) -> None:
        """Order the other ranks to exit with this code; abort them if this rank failed."""


SINGLE_PROCESS = Comm()
_comm: Comm | None = None


def communicator() -> Comm:
    """Return the communicator of this process.

    ConfigError if the MPI library cannot be loaded, or is not the launcher's, or if ranks run
    different software.
    """
    global _comm
    if _comm is None and launcher.is_rank():
        from stepctl.distributed import mpi

        _comm = mpi.connect()
    return _comm or SINGLE_PROCESS


def finalize(exit_code: int, *, failed: bool) -> None:
    """End the job, if this process called `communicator`."""
    if _comm is not None:
        _comm.finalize(exit_code, failed=failed)
