"""Which hooks and stop rules are due, without asking each of them at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar, final


class Due(Protocol):
    """A hook or a stop rule."""

    def due_step(self, step: int) -> float:
        """Return the first global step after `step` at which it is due."""

    def due_time(self) -> float:
        """Return the time.monotonic() from which it is due."""


DueT = TypeVar("DueT", bound=Due)


class _Entry(Generic[DueT]):
    __slots__ = ("item", "step", "time")

    def __init__(self, item: DueT) -> None:
        self.item = item
        self.step: float = -math.inf
        self.time: float = math.inf


@final
class Agenda(Generic[DueT]):
    """Items in a fixed order, each with the step and the time at which it is due next.

    At first all are due. An item says when it is due next each time after it was used.

    Attributes:
        step: The smallest step at which one of them is due.
        time: The smallest time at which one of them is due.
    """

    def __init__(self, items: Iterable[DueT]) -> None:
        self._entries = [_Entry(item) for item in items]
        self.step: float = math.inf
        self.time: float = math.inf
        self.make_all_due()

    def make_all_due(self) -> None:
        """Make all items due now."""
        for entry in self._entries:
            entry.step = -math.inf
            self.step = -math.inf

    def take_due(self, step: int, time: float) -> Iterator[DueT]:
        """Yield the items that are due; those that the caller did not use up stay due."""
        if step < self.step and time < self.time:
            return
        first_step: float = math.inf
        first_time: float = math.inf
        for entry in self._entries:
            if step >= entry.step or time >= entry.time:
                yield entry.item
                entry.step = entry.item.due_step(step)
                entry.time = entry.item.due_time()
            first_step = min(first_step, entry.step)
            first_time = min(first_time, entry.time)
        self.step = first_step
        self.time = first_time
