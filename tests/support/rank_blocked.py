"""A rank that MPI blocks in a receive, where no Python code runs."""

import signal

from mpi4py import MPI

from stepctl.distributed.comm import communicator
from stepctl.distributed.mpi import MPIComm

comm = communicator()
assert isinstance(comm, MPIComm)
if comm.rank:
    signal.pause()
with comm.launcher.killing_this_process():
    print("waits", flush=True)
    MPI.COMM_WORLD.Barrier()
