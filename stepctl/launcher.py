"""What started this process as a rank of an MPI job: what it told of the job, and whether it is still there."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from stepctl.errors import Exit, StepctlError

# What launchers tell each process: Hydra (MPICH, Intel MPI) and Slurm's pmi2; Open MPI; Slurm's pmix.
_HYDRA = "PMI_RANK"
_RANKS = (_HYDRA, "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_NAMED = " /dev/shm/mpich_shm_"
_PR_SET_PDEATHSIG = 1  # prctl(2)


class RankError(StepctlError):
    """What others have to do in a job was not done; rank 0 has the state of the last whole step."""


class NoAnswer(RankError):
    """A stop was asked for while a rank did not answer; rank 0 has the state of the last whole step."""

    exit_code = Exit.STOPPED


def is_rank() -> bool:
    """Tell whether a launcher of MPI jobs started this process."""
    return any(name in os.environ for name in _RANKS)


def is_first() -> bool:
    """Tell whether this process speaks for its job: it is rank 0, or no job's."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def size() -> int:
    """Return how many processes were started together, 0 if that was not told."""
    return next((int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdecimal()), 0)


def remedy() -> str:
    """Return how processes that were started together, but as no ranks, can know of each other; else nothing."""
    if is_rank() or size() < 2:
        return ""
    return "; if they are to be ranks of one job, start them with: srun --mpi=pmi2 (srun --mpi=list shows what it has)"


class Launcher:
    """The process that started this one, and that alone can end the job when one of its processes is lost."""

    def __init__(self) -> None:
        self._pid = os.getppid()

    def is_gone(self) -> bool:
        """Tell whether it was killed."""
        return os.getppid() != self._pid

    def check(self) -> None:
        """Raise RankError if it was killed."""
        if self.is_gone():
            raise RankError("what started this process was killed; start the job again, with resume")

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Be killed with it in here: for what may wait for other ranks with no end, and cannot look up."""
        self.end_together()
        try:
            self.check()
            yield
        finally:
            _signal_at_its_end(0)

    def end_together(self) -> None:
        """From now on, be killed with it."""
        # the processes of Open MPI end by themselves, and what forks them may be a thread that ends before
        if _HYDRA in os.environ:
            _signal_at_its_end(signal.SIGKILL)


def unname_shared_memory() -> None:
    """Let the memory that MPICH's ranks on this host share go with the last of them, also where they are killed.

    For one of them, once all have it; MPICH itself takes the names away at an end in order only.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for path in {line.split()[-1] for line in maps if _NAMED in line}:
            os.unlink(path)


def _signal_at_its_end(number: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
