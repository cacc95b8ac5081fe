"""One run on several ranks: rank 0 leads a segment, and alone writes files; the others follow it step by step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from stepctl import numerics
from stepctl.arena import SOLE, update_target
from stepctl.assembly import Assembly, assemble
from stepctl.asynchronous import AsyncTrainer, next_cut
from stepctl.comm import Comm, Order, World
from stepctl.config import Config
from stepctl.errors import DataError, NonFiniteError
from stepctl.hooks.base import Hook, StopReason
from stepctl.hooks.signals import Signals
from stepctl.hooks.stop import TimeLimit
from stepctl.launcher import RankError
from stepctl.problems import in_one_line, in_user_code
from stepctl.state import Counters, TrainState, restore_counters
from stepctl.tasks.base import OneUpdate
from stepctl.trainer import StopRule, Trainer


class Lead:
    """Rank 0's stop rules together; where none says why to stop, the others are told to make a step too."""

    def __init__(self, comm: World, state: TrainState, rules: Sequence[StopRule], signals: Signals) -> None:
        self._comm, self._state, self._rules, self._signals = comm, state, rules, signals

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        for number in self._comm.signals():
            self._signals.hear(number)
        for rule in self._rules:
            if (why := rule.reason(counters)) is not None:
                return why
        # all must update the same memory: that which a save in flight does not read
        self._comm.lead(Order.STEP, _in_common(self._state) and self._state.handed_over)
        return None


def leader(
    assembly: Assembly,
    *,
    rules: Sequence[StopRule],
    hooks: Sequence[Hook],
    signals: Signals,
    skip: Callable[[str], None] | None,
    target: int,
) -> Trainer:
    """Return rank 0's trainer, which the others follow; they must have been mustered."""
    comm, config = assembly.comm, assembly.config
    task, parts = assembly.task, (assembly.training, assembly.state)
    stop: Sequence[StopRule] = rules
    if isinstance(comm, World):
        stop = [Lead(comm, assembly.state, rules, signals)]
        comm.stop_waiting_when(lambda: signals.reason(assembly.state.counters) is not None)
    if not (isinstance(comm, World) and isinstance(task, OneUpdate) and config.distributed.mode == "async"):
        return Trainer(task, *parts, stop=stop, hooks=hooks, skip=skip)

    def cut(step: int) -> int:
        return next_cut(step, config.cadences().values(), target=target, first_step=config.initial_step + 1)

    def urgent() -> bool:
        # asked after an update, which the counters do not show yet
        over = any(rule.is_over for rule in rules if isinstance(rule, TimeLimit))
        return over or any(rule.reason(assembly.state.counters) is not None for rule in rules)

    return AsyncTrainer(task, *parts, comm=comm, cut=cut, urgent=urgent, stop=stop, hooks=hooks)


def muster(assembly: Assembly) -> list[str]:
    """Have the other ranks take up the state that rank 0 has; return where they compute other last bits than it.

    RankError if one of them cannot.
    """
    comm = assembly.comm
    comm.lead(Order.TRAIN)
    comm.share(None if comm.size == 1 else _known(assembly))
    answers = comm.collect(None)[1:]
    failed = next((problem for problem, _ in answers if problem), None)
    if failed:
        raise RankError(failed)
    take_up(assembly)
    return [difference for _, difference in answers if difference]


def _known(assembly: Assembly) -> tuple[Any, ...]:
    counters = dict(assembly.state.counters)
    return assembly.config.plain(), counters, assembly.numerics, assembly.data_fingerprint


def take_up(assembly: Assembly) -> None:
    """Have the state that rank 0 has: the same memory, where there is such and the task can do with it, or a copy."""
    task, state, comm = assembly.task, assembly.state, assembly.comm
    if comm.size == 1:
        return
    arenas = list(state.arenas.values())
    copied = [] if task.sliced and task.comm.in_common(arenas) else arenas
    for arena in [*copied, state.buffers]:
        comm.copy(update_target(arena))


def _in_common(state: TrainState) -> bool:
    return all(arena.owners is not SOLE for arena in state.arenas.values())


def follow(comm: World) -> int:
    """Do what rank 0 says until it says that it is over; return the exit code. What fails here, rank 0 tells."""
    trainer: Trainer | None = None
    while True:
        order, value = comm.follow()
        if order == Order.END:
            return value
        try:
            if order == Order.TRAIN:
                trainer = _enlist(comm)
            elif order == Order.STEP and trainer is not None:
                if value:
                    trainer.state.hand_over()
                trainer.step()
        except BaseException as error:  # a user's own code may raise anything
            if error is not comm.agreed and not (isinstance(error, NonFiniteError) and error.by_all):
                comm.give_up(_of(comm, error))
                trainer = None


def _enlist(comm: World) -> Trainer | None:
    """Build what rank 0 has, and take up its state; None if that fails, which rank 0 is told."""
    plain, counters, theirs, data = comm.share()
    try:
        assembly = assemble(Config.model_validate(plain), comm=comm)
        assembly.trial()
        if assembly.data_fingerprint != data:
            raise DataError(
                "the data are not those that rank 0 reads; copy them, or keep them where all ranks see them"
            )
    except Exception as error:
        comm.collect((_of(comm, error), ""))
        return None
    differences = numerics.differences(theirs, assembly.numerics)
    answers = comm.collect(("", f"rank {comm.rank}: {'; '.join(differences)}" if differences else ""))
    if any(problem for problem, _ in answers[1:]):
        return None
    take_up(assembly)
    restore_counters(assembly.state.counters, counters)
    task, parts = assembly.task, (assembly.training, assembly.state)
    if isinstance(task, OneUpdate) and assembly.config.distributed.mode == "async":
        return AsyncTrainer(task, *parts, comm=comm)
    return Trainer(task, *parts, stop=[], skip=_pass_over if assembly.config.on_nonfinite == "skip" else None)


def _pass_over(why: str) -> None:
    """Say nothing: rank 0 does."""


def _of(comm: Comm, error: BaseException) -> str:
    where = f"rank {comm.rank} on {os.uname().nodename}"
    return in_one_line(f"{where}: {type(error).__name__}: {error}{in_user_code(error)}")
