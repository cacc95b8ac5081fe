"""A command in an MPI job: rank 0 runs it, and the other ranks follow."""

import click

from stepctl.distributed.comm import Comm, Order, communicator


def join_job() -> Comm:
    """Return the communicator. A rank other than 0 trains with rank 0 here, and exits with the job."""
    comm = communicator()
    if comm.rank:
        raise click.exceptions.Exit(_follow(comm))
    return comm


def _follow(comm: Comm) -> int:
    """Follow rank 0 and return the exit code; `set_numerics` sends the first orders."""
    from stepctl.distributed.mpi import MPIComm

    assert isinstance(comm, MPIComm)
    comm.signals.install_handlers()
    order, value = comm.receive_order()
    if order == Order.END:
        return value
    from stepctl.system import blas

    blas.set_environment(value, comm.broadcast())
    blas.load_numpy()
    from stepctl.training import ranks

    return ranks.follow_rank_zero(comm)


def set_numerics(comm: Comm, requested: tuple[object, object]) -> None:
    """Set BLAS threads and kernel in every rank, and load NumPy with them."""
    from stepctl.system import blas

    threads, kernel = requested
    count = blas.set_environment(threads, kernel, ranks_sharing_cores=comm.ranks_sharing_cores)
    comm.send_order(Order.PIN, count)
    comm.broadcast(kernel if isinstance(kernel, str) else None)
    blas.load_numpy()
