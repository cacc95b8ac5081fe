"""Asynchronous training: every rank updates the shared parameters on its own, from its own batches.

The parameters and all else that an update changes live in a window of rank 0's memory. A rank takes a ticket (its
update's number, and its batch's), reads the parameters, computes a gradient, and applies it to what the parameters
are by then: other ranks may have updated them since, so many times as the update's staleness. The global step counts
the updates of all ranks. Which rank comes first is chance, so no two such runs end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from stepctl.arena import Arena, update_target
from stepctl.comm import World
from stepctl.config import Cadence
from stepctl.data.batches import TrainingBatches
from stepctl.hooks.base import Hook
from stepctl.state import GLOBAL_STEP, Counters, TrainState
from stepctl.tasks.base import Metrics, OneUpdate, as_numbers
from stepctl.tasks.read_only import explained
from stepctl.trainer import StopRule, Trainer
from stepctl.window import Cell, Window


def next_cut(step: int, cadences: Iterable[Cadence], *, target: int, first_step: int) -> int:
    """Return the next global step at which something is to be logged, evaluated or saved, or the target.

    What goes by another counter comes at the cut at which that has come to its value, or past it.
    """
    steps = [target, *([first_step] if step < first_step else [])]
    for cadence in cadences:
        if cadence.every is not None and cadence.counter == GLOBAL_STEP:
            steps.append(step + cadence.every - (step - cadence.offset) % cadence.every)
    return min(steps)


@dataclass
class Tally:
    """What a rank did between two cuts."""

    updates: int = 0
    staleness: int = 0  # in sum
    stalest: int = 0
    last: int = -1  # the step that its last update made,
    metrics: Metrics = field(default_factory=dict)  # and what was measured then


class AsyncTrainer(Trainer):
    """A trainer whose steps are intervals, in which all ranks update as they come, up to a step that is a cut.

    At a cut every update that was begun is complete: `state` is that of exactly so many updates, and hooks and stop
    rules see it. Rank 0 asks `cut` for the cut after a step, and between updates whether it is `urgent` to stop: then
    the cut comes as soon as it can.
    """

    def __init__(
        self,
        task: OneUpdate,
        batches: TrainingBatches,
        state: TrainState,
        *,
        comm: World,
        cut: Callable[[int], int] = lambda step: step,
        urgent: Callable[[], bool] = lambda: False,
        stop: Sequence[StopRule] = (),
        hooks: Sequence[Hook] = (),
    ) -> None:
        super().__init__(task, batches, state, stop=stop, hooks=hooks)
        self._one, self._comm, self._cut, self._urgent = task, comm, cut, urgent
        self._mine = {folder: arena.like().to_read_only(copy=False) for folder, arena in state.arenas.items()}
        ends = [0, *accumulate(arena.n_bytes for arena in state.arenas.values())]
        self._places = dict(zip(state.arenas, ends, strict=False))
        self._window: Window = comm.window(ends[-1])
        if comm.rank == 0:
            self._window.clear()
            for cell in (Cell.TICKET, Cell.LIMIT, Cell.DONE):
                self._window.set(cell, state.counters.global_step)
            self._write(state.arenas)
        self._local_steps, self._staleness, self._stalest = [0] * comm.size, 0, 0

    @property
    def facts(self) -> dict[str, Any]:
        mean = self._staleness / max(sum(self._local_steps), 1)
        return {"local_steps": self._local_steps, "staleness": round(mean, 3), "stalest": self._stalest}

    def _step(self) -> Metrics:
        counters = self.state.counters
        start = counters.global_step
        if self._comm.rank == 0:
            self._window.set(Cell.LIMIT, self._cut(start))
        self._comm.share()  # nobody begins before the limit is set
        with self._comm.launcher.needed():  # a rank that is lost may have the window to itself
            tally = self._interval()
        tallies = self._comm.collect(tally)
        end, whole = self._window.add(Cell.DONE), self.complete
        self.complete = False  # an interrupt may come anywhere
        if self._comm.rank == 0:
            for folder, arena in self.state.arenas.items():
                self._window.get(self._places[folder], update_target(arena))  # the arena itself may be being saved
                arena.turn()
        increments = self.task.increments(counters, self.batches.samples)
        self._count({name: (end - start) * n for name, n in increments.items()})
        self.complete = whole
        return self._summary(tallies, end)

    def _summary(self, tallies: list[Tally], end: int) -> Metrics:
        """Return the metrics of the update that made the step `end`, and the interval's staleness."""
        updates, staleness = sum(tally.updates for tally in tallies), sum(tally.staleness for tally in tallies)
        self._local_steps = [n + tally.updates for n, tally in zip(self._local_steps, tallies, strict=True)]
        self._staleness += staleness
        self._stalest = max(self._stalest, *(tally.stalest for tally in tallies))
        metrics = next((tally.metrics for tally in tallies if tally.last == end), {})
        return metrics | {"staleness": staleness / max(updates, 1)}

    def _interval(self) -> Tally:
        """Make updates until there is no ticket any more."""
        tally, base = Tally(), dict(self.state.counters)
        increments = self.task.increments(self.state.counters, self.batches.samples)

        def counts_at(step: int) -> dict[str, int]:
            made = step - base[GLOBAL_STEP]
            return {name: value + made * increments[name] for name, value in base.items()}

        while (ticket := self._ticket()) is not None:
            counts = counts_at(ticket)
            self._update(TrainState(Counters(counts), self._mine), counts_at, tally)
            if self._comm.signalled() or self._urgent():
                with self._window.exclusive():
                    self._window.set(Cell.LIMIT, self._window.add(Cell.TICKET))
        return tally

    def _ticket(self) -> int | None:
        with self._window.exclusive():
            if self._window.add(Cell.TICKET) == self._window.add(Cell.LIMIT):
                return None
            return self._window.add(Cell.TICKET, 1)

    def _update(self, state: TrainState, counts_at: Callable[[int], dict[str, int]], tally: Tally) -> None:
        """Make one update, on the batch and with the random numbers that the state's counters say."""
        batch = self.batches.batch(state.counters.samples_seen)
        with self._window.exclusive():
            seen = self._window.add(Cell.DONE)
            self._read({"params": self._mine["params"]})
        with explained(state):
            gradient, metrics = self._one.gradient(state, batch)
        with self._window.exclusive():
            done = self._window.add(Cell.DONE)
            self._read(self._mine)
            with explained(state):
                metrics |= self._one.apply(state, gradient, counts_at(done))
            metrics = as_numbers(metrics, "gradient or apply")
            self._write(self._mine)
            self._window.add(Cell.DONE, 1)
        tally.updates, tally.staleness = tally.updates + 1, tally.staleness + done - seen
        tally.stalest, tally.last, tally.metrics = max(tally.stalest, done - seen), done + 1, metrics

    def _read(self, arenas: Mapping[str, Arena]) -> None:
        for folder, arena in arenas.items():
            self._window.get(self._places[folder], update_target(arena))

    def _write(self, arenas: Mapping[str, Arena]) -> None:
        for folder, arena in arenas.items():
            self._window.put(self._places[folder], arena.flat)
