"""Detection of ranks that do not respond."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stepctl.system.terminal import say

if TYPE_CHECKING:
    from stepctl.distributed.mpi import MPIComm

PING_AFTER = 30.0  # seconds that rank 0 waits before it pings the other ranks
RESPONSE_TIMEOUT = 2.0  # seconds


class Heartbeat:
    """Pings the other ranks during a long wait of rank 0, and reports those that do not respond.

    A rank that waits in `poll_until` responds; one that is stopped, hangs or computes does not.
    """

    def __init__(self, comm: MPIComm, clock: Callable[[], float] = time.monotonic) -> None:
        self._comm = comm
        self._clock = clock
        self._start = clock()  # of the wait, or of the last round of pings
        self._ping = 0
        self._silent: set[int] = set()
        self._reported = False

    def poll(self) -> None:
        """Process messages, and send pings or report silent ranks when it is time."""
        self._comm.poll_messages()
        elapsed = self._clock() - self._start
        if self._silent:
            self._silent.difference_update(self._comm.receive_responses(self._ping))
        if not self._silent:
            if elapsed >= PING_AFTER:
                self._send_pings()
        elif elapsed >= RESPONSE_TIMEOUT:
            missing = ", ".join(self._comm.describe_rank(rank) for rank in sorted(self._silent))
            self._report(missing)
            self._comm.raise_if_stop_requested(missing)

    def _send_pings(self) -> None:
        self._start = self._clock()
        self._ping = self._comm.send_pings()
        self._silent = set(range(1, self._comm.size))

    def _report(self, missing: str) -> None:
        if self._reported:
            return
        self._reported = True
        say(
            f"no response from {missing} for {PING_AFTER:.0f} s; resume the process, or stop the job "
            f"with SIGTERM to pid {os.getpid()}"
        )
