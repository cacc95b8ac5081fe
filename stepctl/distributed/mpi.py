"""The communicator of an MPI job. SCALING.md tells how step times depend on the number of ranks.

Training loads mpi4py only here, and only if a launcher started this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from stepctl.distributed import launcher
from stepctl.distributed.comm import SINGLE_PROCESS, Comm, Order, ReportedByRankZero
from stepctl.distributed.heartbeat import Heartbeat
from stepctl.distributed.launcher import Launcher
from stepctl.distributed.polling import POLL_INTERVAL, poll_until
from stepctl.distributed.signal_relay import SignalRelay
from stepctl.errors import ConfigError, NonFiniteError, RankError, RankUnresponsive
from stepctl.system import optional
from stepctl.system.cpus import affinity
from stepctl.system.user_code import user_location

if TYPE_CHECKING:
    from stepctl.distributed.window import Window
    from stepctl.state.arena import Arena, Array
    from stepctl.state.tree_sum import TreeSum

_FAILED = -1  # sent in the place of a signal number
_BROADCAST_ELEMENTS = 1 << 28  # of one message; MPI counts elements in 32 bits
_EXIT_TIMEOUT = 1.0  # seconds that a failed rank waits for the others to exit
_TAG_FAILED = 1  # to rank 0: this rank cannot make another step
_TAG_EXITING = 2  # to rank 0: this rank exits as ordered
_TAG_PING = 3  # from rank 0
_TAG_RESPONSE = 4  # to rank 0, to a ping


def describe_library() -> dict[str, Any]:
    """Initialise MPI, and describe its library for a bug report; "library" is None without mpi4py."""
    if find_spec("mpi4py") is None:
        return {"library": None}
    mpi = optional.require("mpi4py.MPI", "mpi")
    return {
        "library": mpi.Get_library_version().split("\n")[0],
        "standard": ".".join(map(str, mpi.Get_version())),
        "rank": mpi.COMM_WORLD.Get_rank(),
        "ranks": mpi.COMM_WORLD.Get_size(),
    }


def connect() -> Comm:
    """Return the communicator of a rank, as `comm.communicator` describes it."""
    n_started = launcher.job_size()
    if n_started == 1:
        return SINGLE_PROCESS
    launcher_process = Launcher()
    try:
        with launcher_process.killing_this_process():
            return _load_mpi(n_started, launcher_process)
    except ConfigError as error:
        if launcher.is_rank_zero():
            raise
        raise ReportedByRankZero(str(error)) from error


def _load_mpi(n_started: int, launcher_process: Launcher) -> Comm:
    from stepctl.distributed import software

    os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")
    # the thread that writes checkpoints makes no MPI calls
    optional.require("mpi4py", "mpi").rc(thread_level="funneled")
    mpi = optional.require("mpi4py.MPI", "mpi")
    if mpi.COMM_WORLD.size == 1 < n_started:
        library = mpi.Get_library_version().split("\n")[0].strip("\0 ")
        raise ConfigError(
            f"{n_started} processes were started together, but mpi4py's MPI library ({library}) sees "
            "only one; start them with the mpiexec of that library, or install mpi4py for the library "
            "of your mpiexec"
        )
    if mpi.COMM_WORLD.size == 1:
        return SINGLE_PROCESS
    software.check_same_software(mpi.COMM_WORLD.allgather(software.installed_software()))
    return MPIComm(mpi, launcher_process)


class MPIComm(Comm):
    """The communicator of an MPI job. Rank 0 broadcasts orders, and only rank 0 writes files.

    `launcher` is the launcher's process, `signals` the signals that ranks exchange,
    `collective_error` the last error that a collective method raised in all ranks.
    """

    def __init__(self, mpi: Any, launcher_process: Launcher) -> None:
        """`mpi` is the module mpi4py.MPI."""
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self._order_comm = self._comm.Dup()  # still usable for orders when a step has failed
        self.rank = self._comm.rank
        self.size = self._comm.size
        self.launcher = launcher_process
        self.signals = SignalRelay()
        self.collective_error: Exception | None = None
        self._windows: list[Any] = []
        self._processes = self._comm.allgather((os.uname().nodename, os.getpid()))
        self._n_pings = 0
        self._ping_requests: list[Any] = []  # requests are kept until the messages are sent
        self._response_request: Any = None
        self._failure_request: Any = None
        self._stop_requested: Callable[[], bool] = lambda: False
        self._left_step = False  # whether rank 0 left a step in which other ranks may still wait
        self._finalized = False
        self._inspect_host()

    def _inspect_host(self) -> None:
        """Compare this rank with the other ranks on its host."""
        host_comm = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        cores = affinity()
        self.ranks_sharing_cores = host_comm.allgather(cores).count(cores)
        self._one_host = host_comm.size == self.size
        if host_comm.rank == 0:
            launcher.unlink_mpich_shared_memory()
        host_comm.Free()

    def share_arenas(self, arenas: Sequence[Arena]) -> bool:
        from stepctl.distributed import shared_memory

        if not self._one_host:
            return False
        memory = shared_memory.allocate(shared_memory.n_bytes(arenas), self)
        if memory is None:
            return False
        partition = shared_memory.RankPartition(self._comm, self._wait, self._mpi.IN_PLACE)
        partition.move_arenas(arenas, memory)
        return True

    def tree_sum(self, layout: Arena, shards: int) -> TreeSum:
        from stepctl.distributed import shared_memory
        from stepctl.distributed.gradient_sum import MessageTreeSum, SharedMemoryTreeSum

        leaves = self.shards_by_rank(shards)
        if isinstance(layout.partition, shared_memory.RankPartition):
            n_bytes = SharedMemoryTreeSum.n_bytes(layout, leaves)
            memory = shared_memory.allocate(self.size * n_bytes, self)
            if memory is not None:
                return SharedMemoryTreeSum(layout, self.rank, leaves, memory)
        return MessageTreeSum(layout, self._comm, leaves, self._wait, self._mpi.IN_PLACE)

    def gather_metrics(
        self,
        metrics: list[dict[str, float]],
        names: Sequence[str],
        shards: int,
        error: Exception | None,
    ) -> list[dict[str, float]]:
        import numpy as np

        table = np.zeros((self.size, 1 + shards * len(names)))  # a status, then the metrics
        own_row = table[self.rank]
        if error is None:
            own_row[0] = self.signals.pop_pending()
            own_row[1:] = [shard_metrics[name] for shard_metrics in metrics for name in names]
        else:
            own_row[0] = _FAILED
        self._wait(self._comm.Iallgather(self._mpi.IN_PLACE, table))
        statuses = table[:, 0].astype(int).tolist()
        if _FAILED in statuses:
            self._raise_everywhere(statuses.index(_FAILED), error)
        self.signals.receive(statuses)
        values_by_shard = table[:, 1:].reshape(-1, len(names)).tolist()
        return [dict(zip(names, values, strict=True)) for values in values_by_shard]

    def _raise_everywhere(self, failed_rank: int, error: Exception | None) -> NoReturn:
        """Raise this rank's own error, or one that describes the error of `failed_rank`.

        If that is a NonFiniteError, every rank raises one: a step that is skipped is skipped by
        all.
        """
        text = "" if error is None else f"{error}{user_location(error)}"
        is_non_finite = isinstance(error, NonFiniteError)
        own = (os.uname().nodename, type(error).__name__, text, is_non_finite)
        with self._synchronized():
            sent = own if failed_rank == self.rank else None
            host, kind, text, is_non_finite = self._comm.bcast(sent, failed_rank)
        if error is not None and isinstance(error, NonFiniteError) == is_non_finite:
            self.collective_error = error
        else:
            error_class = NonFiniteError if is_non_finite else RankError
            self.collective_error = error_class(f"rank {failed_rank} on {host}: {kind}: {text}")
        raise self.collective_error

    def report_failure(self, message: str) -> None:
        """Report to rank 0 that this rank failed; from now on it may only receive orders."""
        self._failure_request = self._comm.isend(message, 0, _TAG_FAILED)

    def send_order(self, order: Order, value: int = 0) -> None:
        self.poll_messages()
        # not a NumPy array: NumPy may not be loaded yet
        self._wait(self._order_comm.Ibcast(array("q", [order, value])))

    def receive_order(self) -> tuple[Order, int]:
        """Wait for rank 0's next order, and return it with its integer."""
        message = array("q", [0, 0])
        self._wait(self._order_comm.Ibcast(message))
        return Order(message[0]), message[1]

    def broadcast(self, value: Any = None) -> Any:
        with self._synchronized():
            return self._comm.bcast(value)

    def all_gather(self, value: Any) -> list[Any]:
        with self._synchronized():
            messages = self._comm.allgather((self.signals.pop_pending(), value))
        self.signals.receive(number for number, _ in messages)
        return [value for _, value in messages]

    def allocate_window(self, n_bytes: int) -> Window:
        """Return a window on `n_bytes` of rank 0's memory; a collective call."""
        from stepctl.distributed.window import Window

        size = Window.size(n_bytes) if self.rank == 0 else 0
        with self._synchronized():
            window = self._mpi.Win.Allocate(size, 1, comm=self._comm)
            window.Lock_all()
        self._windows.append(window)
        return Window(window, self._mpi.SUM)

    def broadcast_array(self, values: Array) -> None:
        for start in range(0, values.size, _BROADCAST_ELEMENTS):
            self._wait(self._comm.Ibcast(values[start : start + _BROADCAST_ELEMENTS]))

    @contextlib.contextmanager
    def _synchronized(self) -> Iterator[None]:
        """Wait for all ranks. The block may then make blocking MPI calls."""
        self._wait(self._comm.Ibarrier())
        with self.launcher.killing_this_process():
            yield

    def _wait(self, request: Any) -> None:
        """Wait for an MPI request without holding the core, as MPI's own wait does.

        RankError if the launcher is gone; in rank 0 also if another rank failed.
        """
        if self.rank == 0:
            poll_until(request.Test, Heartbeat(self).poll)
        else:
            poll_until(request.Test, self.poll_messages)

    def set_stop_check(self, stop_requested: Callable[[], bool]) -> None:
        """Let rank 0 end the job if a stop is requested while another rank does not respond."""
        self._stop_requested = stop_requested

    def send_pings(self) -> int:
        """Ping all other ranks; return the number of this round."""
        self._n_pings += 1
        self._ping_requests = [
            self._comm.isend(self._n_pings, rank, _TAG_PING) for rank in range(1, self.size)
        ]
        return self._n_pings

    def receive_responses(self, ping: int) -> Iterator[int]:
        """Yield the ranks whose response to this round has arrived since the last call."""
        status = self._mpi.Status()
        while self._comm.Iprobe(tag=_TAG_RESPONSE, status=status):
            rank = status.Get_source()
            if self._comm.recv(source=rank, tag=_TAG_RESPONSE) == ping:
                yield rank

    def describe_rank(self, rank: int) -> str:
        """Return a rank with its host and pid, for a message."""
        host, pid = self._processes[rank]
        return f"rank {rank} on {host} (pid {pid})"

    def raise_if_stop_requested(self, missing: str) -> None:
        """Raise an error if a stop was requested while the `missing` ranks do not respond.

        RankUnresponsive during training; RankError if SIGTERM came before, when it is still
        blocked.
        """
        if self._stop_requested():
            self._left_step = True
            raise RankUnresponsive(
                f"stopped while {missing} did not respond; start the job again with: stepctl resume"
            )
        if signal.SIGTERM in signal.sigpending():
            self._left_step = True
            raise RankError(f"stopped while {missing} did not respond; start the job again")

    def poll_messages(self) -> None:
        """Respond to a ping of rank 0.

        RankError if the launcher is gone; in rank 0 also if another rank failed.
        """
        self.launcher.check()
        if self.rank and self._comm.Iprobe(source=0, tag=_TAG_PING):
            ping = self._comm.recv(source=0, tag=_TAG_PING)
            self._response_request = self._comm.isend(ping, 0, _TAG_RESPONSE)
        if self.rank == 0 and self._comm.Iprobe(tag=_TAG_FAILED):
            self._left_step = True
            raise RankError(self._comm.recv(tag=_TAG_FAILED))

    def finalize(self, exit_code: int, *, failed: bool) -> None:
        if self._finalized:
            return
        self._finalized = True
        self.launcher.kill_this_process_at_exit()
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                sys.stderr.flush()  # now: the launcher needs a moment to forward it before an abort
        all_exit = self._all_ranks_exit(exit_code, failed)
        if self.launcher.is_gone():
            os._exit(exit_code)  # MPI's finalization would wait for the launcher
        if all_exit:
            for window in self._windows:
                window.Unlock_all()
                window.Free()
            return
        # the error was printed already; hide MPI's own message about the abort
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self._comm.Abort(exit_code)

    def _all_ranks_exit(self, exit_code: int, failed: bool) -> bool:
        """Order the ranks to exit, and tell whether all of them do.

        A failed rank waits a moment for the others, which may be inside a step. In this moment the
        launcher also forwards the output of the ranks, which it would discard at an abort.
        """
        if self.launcher.is_gone():
            return False
        if self.rank and not failed:
            self._comm.send(None, 0, _TAG_EXITING)
            return True
        if self.rank == 0:
            self._order_comm.Ibcast(array("q", [Order.END, exit_code])).Wait()
        n_awaited = self.size - 1
        deadline = time.monotonic() + _EXIT_TIMEOUT
        while not failed or time.monotonic() < deadline:
            if self.launcher.is_gone():
                return False
            if self.rank == 0 and self._comm.Iprobe(tag=_TAG_EXITING):
                self._comm.recv(tag=_TAG_EXITING)
                n_awaited -= 1
            if n_awaited == 0 and not self._left_step:
                return True
            time.sleep(POLL_INTERVAL)
        return False
