"""Asynchronous training: each rank updates the shared parameters by itself, from its own batches.

All arrays that an update changes are in a window of rank 0's memory. A rank takes a ticket, which
is the number of its update and of its batch; it reads the parameters, computes a gradient, and
applies it to the current parameters. The number of updates by other ranks in between is the
gradient's staleness. The global step counts the updates of all ranks. Their order depends on
timing, so two such runs never end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepctl.config.cadence import Cadence
from stepctl.data.batches import Batches
from stepctl.distributed.mpi import MPIComm
from stepctl.distributed.window import Cell, Window
from stepctl.hooks.base import Hook
from stepctl.hooks.stop_request import HookStop
from stepctl.programs.base import Metrics, OneUpdate, as_numbers
from stepctl.state.arena import Arena, update_target
from stepctl.state.counters import GLOBAL_STEP, Counters
from stepctl.state.read_only import explain_read_only
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopRule
from stepctl.training.trainer import Lead, Trainer, Update


def next_cut(step: int, cadences: Iterable[Cadence], *, target: int, first_step: int) -> int:
    """Return the first global step after `step` that is the target or on a cadence's grid.

    The first step of a run is a cut too. A cadence on another counter fires at the cut after its
    counter reached or passed a grid value.
    """
    steps = [target]
    if step < first_step:
        steps.append(first_step)
    for cadence in cadences:
        next_step = cadence.next_step(step)
        if next_step is not None:
            steps.append(next_step)
    return min(steps)


@dataclass
class IntervalTally:
    """The updates of one rank between two cuts."""

    updates: int = 0
    staleness_sum: int = 0
    max_staleness: int = 0
    last_step: int = -1  # global step of the last update, which measured `metrics`
    metrics: Metrics = field(default_factory=dict)

    def add(self, step: int, staleness: int, metrics: Metrics) -> None:
        """Count the update that made a global step."""
        self.updates += 1
        self.staleness_sum += staleness
        self.max_staleness = max(self.max_staleness, staleness)
        self.last_step = step
        self.metrics = metrics


class AsyncTrainer(Trainer):
    """A trainer whose steps are intervals of many updates; an interval ends at a cut.

    At a cut, a global step, every update that was begun is complete, and hooks and stop rules see
    the state. On rank 0 `cut` returns the cut after a step, and `urgent`, called between updates,
    whether the interval must end as soon as possible.
    """

    def __init__(
        self,
        task: OneUpdate,
        batches: Batches,
        state: TrainState,
        *,
        comm: MPIComm,
        cut: Callable[[int], int] = lambda step: step,
        urgent: Callable[[], bool] = lambda: False,
        stop: Sequence[StopRule] = (),
        hooks: Sequence[Hook] = (),
        hook_stop: HookStop | None = None,
        lead: Lead | None = None,
    ) -> None:
        super().__init__(
            task,
            batches,
            state,
            stop=stop,
            hooks=hooks,
            hook_stop=hook_stop,
            lead=lead,
            signalled=lambda: True,  # an interval ends where a rule or a hook is due
        )
        self._one_update = task
        self._comm = comm
        self._cut = cut
        self._urgent = urgent
        self._copies = {  # this rank's copies of the shared arenas
            folder: arena.like().to_read_only(copy=False) for folder, arena in state.arenas.items()
        }
        self._offsets: dict[str, int] = {}  # bytes, in the window
        n_bytes = 0
        for folder, arena in state.arenas.items():
            self._offsets[folder] = n_bytes
            n_bytes += arena.n_bytes
        self._window: Window = comm.allocate_window(n_bytes)
        if comm.rank == 0:
            self._window.clear()
            for cell in (Cell.TICKET, Cell.LIMIT, Cell.DONE):
                self._window.set(cell, state.counters.global_step)
            self._write(state.arenas)
        self._updates_by_rank = [0] * comm.size
        self._staleness_sum = 0
        self._max_staleness = 0

    @property
    def facts(self) -> dict[str, Any]:
        """The updates of each rank, and the mean and the maximum of the staleness."""
        n_updates = max(sum(self._updates_by_rank), 1)
        return {
            "local_steps": self._updates_by_rank,
            "staleness": round(self._staleness_sum / n_updates, 3),
            "stalest": self._max_staleness,
        }

    def _update(self) -> Update:
        """Take part in one interval; return the metrics of its last update."""
        counters = self.state.counters
        start = counters.global_step
        if self._comm.rank == 0:
            self._window.set(Cell.LIMIT, self._cut(start))
        self._comm.broadcast()  # no rank begins before the limit is set
        # a lost rank may hold the window's lock: nothing here waits for the others
        with self._comm.launcher.killing_this_process():
            tally = self._make_updates()
        tallies = self._comm.all_gather(tally)
        end = self._window.read(Cell.DONE)
        self.complete = False  # an interrupt may come anywhere
        if self._comm.rank == 0:
            for folder, arena in self.state.arenas.items():
                # into the spare buffer: a save may be reading the other
                self._window.get(self._offsets[folder], update_target(arena))
                arena.swap_buffers()
        per_update = self.task.increments(counters, self.batches.samples)
        increments = {name: (end - start) * n for name, n in per_update.items()}
        return Update(self._summarize(tallies, end), increments)

    def _summarize(self, tallies: list[IntervalTally], end: int) -> Metrics:
        """Add the ranks' tallies to the totals.

        Returns the metrics of the update that made the step `end`, and the interval's mean
        staleness.
        """
        n_updates = sum(tally.updates for tally in tallies)
        staleness_sum = sum(tally.staleness_sum for tally in tallies)
        metrics: Metrics = {}
        for rank, tally in enumerate(tallies):
            self._updates_by_rank[rank] += tally.updates
            self._max_staleness = max(self._max_staleness, tally.max_staleness)
            if tally.last_step == end:
                metrics = tally.metrics
        self._staleness_sum += staleness_sum
        return metrics | {"staleness": staleness_sum / max(n_updates, 1)}

    def _make_updates(self) -> IntervalTally:
        """Make updates until the tickets run out."""
        tally = IntervalTally()
        base = dict(self.state.counters)
        increments = self.task.increments(self.state.counters, self.batches.samples)

        def counts_at(step: int) -> dict[str, int]:
            n_updates = step - base[GLOBAL_STEP]
            return {name: value + n_updates * increments[name] for name, value in base.items()}

        while True:
            ticket = self._take_ticket()
            if ticket is None:
                return tally
            state = TrainState(Counters(counts_at(ticket)), self._copies)
            self._make_update(state, counts_at, tally)
            if self._comm.signals.has_pending or self._urgent():
                # no rank gets another ticket: the interval ends after the updates in flight
                with self._window.locked():
                    self._window.set(Cell.LIMIT, self._window.read(Cell.TICKET))

    def _take_ticket(self) -> int | None:
        """Return the number of the next update; None at the cut."""
        with self._window.locked():
            if self._window.read(Cell.TICKET) == self._window.read(Cell.LIMIT):
                return None
            return self._window.add(Cell.TICKET, 1)

    def _make_update(
        self, state: TrainState, counts_at: Callable[[int], dict[str, int]], tally: IntervalTally
    ) -> None:
        """Make one update; the counters of `state` decide its batch and its random numbers."""
        batch = self.batches.batch(state.counters.samples_seen)
        with self._window.locked():
            begun_at = self._window.read(Cell.DONE)
            self._read({"params": self._copies["params"]})
        with explain_read_only(state):
            gradient, metrics = self._one_update.gradient(state, batch)
        with self._window.locked():
            applied_at = self._window.read(Cell.DONE)
            self._read(self._copies)
            with explain_read_only(state):
                metrics |= self._one_update.apply(state, gradient, counts_at(applied_at))
            metrics = as_numbers(metrics, "task: gradient or apply returned")
            self._write(self._copies)
            self._window.add(Cell.DONE, 1)
        tally.add(applied_at + 1, applied_at - begun_at, metrics)

    def _read(self, arenas: Mapping[str, Arena]) -> None:
        for folder, arena in arenas.items():
            self._window.get(self._offsets[folder], update_target(arena))

    def _write(self, arenas: Mapping[str, Arena]) -> None:
        for folder, arena in arenas.items():
            self._window.put(self._offsets[folder], arena.flat)
