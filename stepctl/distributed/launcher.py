"""The MPI launcher (mpiexec, srun): its environment variables, and its process."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from stepctl.errors import ConfigError, RankError

# Environment variables of Hydra (MPICH, Intel MPI) and Slurm's pmi2, Open MPI, and Slurm's pmix.
_HYDRA_RANK = "PMI_RANK"
_RANK_VARIABLES = (_HYDRA_RANK, "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_MPICH_SHARED_MEMORY = " /dev/shm/mpich_shm_"
_PR_SET_PDEATHSIG = 1  # prctl(2)


def is_rank() -> bool:
    """Tell whether an MPI launcher started this process."""
    return any(name in os.environ for name in _RANK_VARIABLES)


def is_rank_zero() -> bool:
    """Tell whether this process is rank 0 of its job; true without a launcher."""
    ranks = [os.environ[name] for name in _RANK_VARIABLES if name in os.environ]
    return not ranks or ranks[0] == "0"


def job_size() -> int:
    """Return the number of processes that were started together; 0 if it is unknown."""
    for name in _SIZE_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


def refuse_job() -> None:
    """Raise ConfigError in an MPI job: each rank would train a run of its own."""
    ranks = job_size()
    if is_rank() and ranks != 1:
        share = f"mpiexec -n {ranks or 'N'} stepctl train FILE"
        raise ConfigError(
            f"the library runs in one process, and this is one of {ranks or 'several'} that were "
            "started together; start the script without mpiexec, or share the steps of a run "
            f"among processes with: {share}"
        )


def srun_hint() -> str:
    """Return a hint if srun started several processes without MPI; else an empty string."""
    if is_rank() or job_size() < 2:
        return ""
    return (
        "; to start processes as ranks of one MPI job, use srun --mpi=pmi2 (srun --mpi=list shows the "
        "available types)"
    )


class Launcher:
    """The launcher's process: only it can end the job when a rank is lost."""

    def __init__(self) -> None:
        self._pid = os.getppid()

    def is_gone(self) -> bool:
        """Tell whether it was killed."""
        return os.getppid() != self._pid

    def check(self) -> None:
        """Raise RankError if it was killed."""
        if self.is_gone():
            raise RankError(
                "the MPI launcher that started this process was killed; start the job again with: stepctl resume"
            )

    @contextlib.contextmanager
    def killing_this_process(self) -> Iterator[None]:
        """Let the kernel kill this process with the launcher: for MPI calls that may block forever.

        RankError if the launcher is gone already.
        """
        self.kill_this_process_at_exit()
        try:
            self.check()
            yield
        finally:
            _set_parent_death_signal(0)

    def kill_this_process_at_exit(self) -> None:
        """Let the kernel kill this process when the launcher exits, from now on."""
        # Open MPI's processes exit by themselves, and a thread of its launcher may fork them and
        # exit before
        if _HYDRA_RANK in os.environ:
            _set_parent_death_signal(signal.SIGKILL)


def unlink_mpich_shared_memory() -> None:
    """Unlink the shared memory of MPICH's ranks on this host, so that a kill leaves none behind.

    Call it in one of them, once all have mapped it. MPICH itself only unlinks it in a regular exit.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for path in {line.split()[-1] for line in maps if _MPICH_SHARED_MEMORY in line}:
            os.unlink(path)


def _set_parent_death_signal(number: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
