"""When a periodic action runs: `every: n, offset: k` on a counter.

Example:
    cadence = Cadence(every=10)
    if cadence.fires(state.counters):  # after each update
        ...
    cadence.steps(0, 100)  # 10, 20, ..., 100
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from typing import final

from stepctl.state.counters import GLOBAL_STEP, Counters


@final
class Cadence:
    """Fires where a counter reaches or passes a value with value % every == offset.

    A counter that rises by more than one in an update may pass such a value without being equal to it.

    Args:
        every: Without it the cadence never fires.
        offset: From 0 to every - 1.
        counter: Name of the counter.
        first_step: The first global step of the run, at which it fires in any case.
    """

    def __init__(
        self,
        every: int | None,
        offset: int = 0,
        counter: str = GLOBAL_STEP,
        *,
        first_step: int | None = None,
    ) -> None:
        self.every = every
        self.offset = offset
        self.counter = counter
        self._first_step = first_step
        self._next_value: float = 0 if every is not None else math.inf

    def fires(self, counters: Counters) -> bool:
        """Return whether the last update reached or passed such a value.

        It must be called at each `due_step`; calls at other steps do no harm.
        """
        value = counters[self.counter]
        if value < self._next_value:  # the usual case, which must be cheap
            return False
        self._next_value = self._grid_value_after(value)
        crossed = self._next_value > self._grid_value_after(counters.previous(self.counter))
        return crossed or counters.global_step == self._first_step

    def due_step(self, step: int) -> float:
        """Return the first global step after `step` at which it may fire; infinity if there is none."""
        if self.every is None:
            return math.inf
        if self.counter != GLOBAL_STEP:
            return step + 1
        next_step = self._grid_value_after(step)
        if self._first_step is not None and self._first_step > step:
            next_step = min(next_step, self._first_step)
        return next_step

    def next_step(self, step: int) -> int | None:
        """Return the first firing global step after `step`; None if never, or on another counter."""
        if self.every is None or self.counter != GLOBAL_STEP:
            return None
        return self._grid_value_after(step)

    def steps(self, start: int, last: int, count: Callable[[int], int] | None = None) -> Steps:
        """Return the firing global steps after `start`, up to `last`, without listing them.

        `count` returns the counter's value at a global step; the global step itself needs none.
        """
        if self.every is None or last <= start:
            return range(0)
        if self.counter == GLOBAL_STEP:
            return range(self._grid_value_after(start), last + 1, self.every)
        assert count is not None, f"the values of {self.counter} are needed"
        if count(last) - count(start) >= self.every * (last - start):
            return range(start + 1, last + 1)  # such a value is passed at each step
        return CrossingSteps(count, self.every, self.offset, start, last)

    def _grid_value_after(self, value: int) -> int:
        """Return the smallest value above `value` with value % every == offset."""
        assert self.every is not None
        return value + self.every - (value - self.offset) % self.every


@final
class CrossingSteps:
    """The steps in (start, last] at which a count reaches or passes value % every == offset.

    The count rises with the step, by less than `every` a step. Steps are found by bisection.
    """

    def __init__(
        self, count: Callable[[int], int], every: int, offset: int, start: int, last: int
    ) -> None:
        self._count = count
        self._every = every
        self._offset = offset
        self._steps = range(start + 1, max(start, last) + 1)
        self._passed = self._number(start)

    def _number(self, step: int) -> int:
        return (self._count(step) - self._offset) // self._every

    def __len__(self) -> int:
        if not self._steps:
            return 0
        return self._number(self._steps[-1]) - self._passed

    def __getitem__(self, index: int) -> int:
        if index < 0:
            index += len(self)
        value = self._offset + self._every * (self._passed + 1 + index)
        return self._steps[bisect.bisect_left(self._steps, value, key=self._count)]

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(len(self)))

    def __contains__(self, step: int) -> bool:
        return step in self._steps and self._number(step) > self._number(step - 1)


Steps = range | CrossingSteps  # a sorted collection: len(), [index], in
