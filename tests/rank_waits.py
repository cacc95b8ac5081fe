"""A rank that MPI keeps waiting for another, which never comes: nothing of Python's own runs in it."""

import signal

from mpi4py import MPI

from stepctl import comm
from stepctl.comm import World

world = comm.world()
assert isinstance(world, World)
if world.rank:
    signal.pause()
with world.launcher.needed():
    print("waits", flush=True)
    MPI.COMM_WORLD.Barrier()
