"""One run on several ranks: rank 0 writes all files, and the others make its steps.

rank 0                       other ranks, in follow_rank_zero
start_ranks                  build the same assembly, receive the state
RankLead.order_step, step    step
MPIComm.finalize             return the exit code
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stepctl.config.model import validate
from stepctl.distributed.comm import Comm, Order
from stepctl.distributed.mpi import MPIComm
from stepctl.errors import DataError, NonFiniteError, RankError
from stepctl.hooks.base import Hook
from stepctl.programs.base import OneUpdate
from stepctl.state.arena import UNDIVIDED, update_target
from stepctl.state.train_state import TrainState, restore_counters
from stepctl.stopping.base import StopRule, first_reason
from stepctl.stopping.rules import TimeLimit
from stepctl.stopping.signals import Signals
from stepctl.system import blas
from stepctl.system.text import in_one_line
from stepctl.system.user_code import user_location
from stepctl.training.assembly import Assembly
from stepctl.training.build import assemble
from stepctl.training.compile_updates import compile_updates
from stepctl.training.trainer import Trainer


class _TrainOrder(NamedTuple):
    """Rank 0's assembly, as the other ranks must have it."""

    config: dict[str, Any]
    counters: dict[str, int]
    numerics: blas.Numerics
    data_fingerprint: str
    n_steps: int


class _Answer(NamedTuple):
    """Why a rank cannot train, and how its numerics differ; empty texts if all is well."""

    failure: str = ""
    difference: str = ""


def start_ranks(assembly: Assembly, n_steps: int) -> list[str]:
    """Have the other ranks build the same assembly, and give them rank 0's state.

    `n_steps` are the steps that are expected of them. Returns the differences of their numerics.
    RankError if one of them cannot train.
    """
    comm = assembly.comm
    comm.send_order(Order.TRAIN)
    if comm.size == 1:
        return []
    order = _TrainOrder(
        assembly.config.without_hooks().plain(),
        dict(assembly.state.counters),
        assembly.numerics,
        assembly.data_fingerprint(),
        n_steps,
    )
    comm.broadcast(order)
    answers = comm.all_gather(_Answer())
    for answer in answers:
        if answer.failure:
            raise RankError(answer.failure)
    broadcast_state(assembly)
    return [answer.difference for answer in answers if answer.difference]


def broadcast_state(assembly: Assembly) -> None:
    """Distribute the arrays of rank 0 to all ranks, in shared memory if the task allows it, or as copies."""
    task = assembly.task
    state = assembly.state
    comm = assembly.comm
    arenas = list(state.arenas.values())
    shared = task.sliced and task.comm.share_arenas(arenas)
    copied = [state.buffers] if shared else [*arenas, state.buffers]
    for arena in copied:
        comm.broadcast_array(update_target(arena))
    for array in state.preprocessing.values():
        comm.broadcast_array(array)


def _is_shared(state: TrainState) -> bool:
    return all(arena.partition is not UNDIVIDED for arena in state.arenas.values())


class RankLead:
    """Rank 0's link to the other ranks between steps."""

    def __init__(self, comm: MPIComm, state: TrainState, signals: Signals) -> None:
        self._comm = comm
        self._state = state
        self._signals = signals

    def receive_signals(self) -> None:
        """Collect the signals that other ranks received."""
        for number in self._comm.signals.pop_received():
            self._signals.receive(number)

    def order_step(self) -> None:
        """Order the other ranks to make a step."""
        # all must update the same buffer of shared memory: the one that no save is reading
        swap = _is_shared(self._state) and self._state.in_snapshot
        self._comm.send_order(Order.STEP, swap)


def leader(
    assembly: Assembly,
    *,
    rules: Sequence[StopRule],
    hooks: Sequence[Hook],
    signals: Signals,
    skip: Callable[[str], None] | None,
    target: int,
) -> Trainer:
    """Return rank 0's trainer; `start_ranks` must have given the other ranks its state."""
    comm = assembly.comm
    config = assembly.config
    task = assembly.task
    state = assembly.state
    batches = assembly.training
    hook_stop = assembly.hook_stop
    lead = None
    if isinstance(comm, MPIComm):
        lead = RankLead(comm, state, signals)
        comm.set_stop_check(lambda: signals.reason(state.counters) is not None)
    if not (isinstance(comm, MPIComm) and isinstance(task, OneUpdate) and config.is_async):
        return Trainer(
            task,
            batches,
            state,
            stop=rules,
            hooks=hooks,
            hook_stop=hook_stop,
            skip=skip,
            lead=lead,
            signalled=signals.is_pending,
        )

    from stepctl.training.async_trainer import AsyncTrainer, next_cut

    def cut(step: int) -> int:
        cadences = config.cadences().values()
        return next_cut(step, cadences, target=target, first_step=config.initial_step + 1)

    def urgent() -> bool:
        # not by its reason: the counters do not show the updates of this interval yet
        if any(rule.is_over for rule in rules if isinstance(rule, TimeLimit)):
            return True
        return first_reason(rules, state.counters) is not None

    return AsyncTrainer(
        task,
        batches,
        state,
        comm=comm,
        cut=cut,
        urgent=urgent,
        stop=rules,
        hooks=hooks,
        hook_stop=hook_stop,
        lead=lead,
    )


def follow_rank_zero(comm: MPIComm) -> int:
    """Obey rank 0's orders until the end, and return the exit code.

    An error of this rank alone is sent to rank 0, which reports it.
    """
    trainer: Trainer | None = None
    while True:
        order, value = comm.receive_order()
        if order == Order.END:
            return value
        try:
            if order == Order.TRAIN:
                trainer = _join_training(comm)
            elif order == Order.STEP and trainer is not None:
                if value:
                    trainer.state.snapshot()
                trainer.step()
        except BaseException as error:  # a user's code may raise anything
            known_to_all = isinstance(error, NonFiniteError) and error.on_all_ranks
            if error is not comm.collective_error and not known_to_all:
                comm.report_failure(_describe(comm, error))
                trainer = None


def _join_training(comm: MPIComm) -> Trainer | None:
    """Build rank 0's assembly and receive its state; None if this or another rank cannot train."""
    order: _TrainOrder = comm.broadcast()
    try:
        assembly = assemble(validate(order.config), comm=comm)
        assembly.trial()
        if assembly.data_fingerprint() != order.data_fingerprint:
            raise DataError(
                "the data differ from rank 0's; copy them to this host, or keep them on a shared "
                "file system"
            )
    except Exception as error:
        comm.all_gather(_Answer(failure=_describe(comm, error)))
        return None
    differences = blas.numerics_differences(order.numerics, assembly.numerics)
    answer = _Answer()
    if differences:
        answer = _Answer(difference=f"rank {comm.rank}: {'; '.join(differences)}")
    if any(other.failure for other in comm.all_gather(answer)):
        return None
    broadcast_state(assembly)
    restore_counters(assembly.state.counters, order.counters)
    compile_updates(assembly, order.n_steps)  # rank 0 reports a failure
    task = assembly.task
    if isinstance(task, OneUpdate) and assembly.config.is_async:
        from stepctl.training.async_trainer import AsyncTrainer

        return AsyncTrainer(task, assembly.training, assembly.state, comm=comm)
    skip = _skip_silently if assembly.config.skips_non_finite else None
    return Trainer(task, assembly.training, assembly.state, stop=[], skip=skip)


def _skip_silently(why: str) -> None:
    """Skip a batch; rank 0 reports it."""


def _describe(comm: Comm, error: BaseException) -> str:
    where = f"rank {comm.rank} on {os.uname().nodename}"
    return in_one_line(f"{where}: {type(error).__name__}: {error}{user_location(error)}")
