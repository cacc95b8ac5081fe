"""Ranks that increment a shared counter in a window, read and write apart."""

import sys

from stepctl.distributed.comm import communicator, finalize
from stepctl.distributed.mpi import MPIComm
from stepctl.distributed.window import Cell

comm = communicator()
assert isinstance(comm, MPIComm)
window = comm.allocate_window(0)
if comm.rank == 0:
    window.clear()
comm.all_gather(None)
for _ in range(int(sys.argv[1])):
    with window.locked():
        window.set(Cell.DONE, window.read(Cell.DONE) + 1)
comm.all_gather(None)
if comm.rank == 0:
    print(window.read(Cell.DONE))
else:
    comm.receive_order()  # rank 0's word that it is over
finalize(0, failed=False)
