"""Which hooks and stop rules are due, without asking each of them at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar, final


class Scheduled(Protocol):
    """A hook or a stop rule."""

    def due_step(self, step: int) -> float:
        """Return the first global step after `step` at which it is due."""

    def due_time(self) -> float:
        """Return the time.monotonic() from which it is due."""


ItemT = TypeVar("ItemT", bound=Scheduled)


class _Entry(Generic[ItemT]):
    __slots__ = ("item", "step", "time")

    def __init__(self, item: ItemT) -> None:
        self.item = item
        self.step: float = -math.inf
        self.time: float = math.inf


@final
class Agenda(Generic[ItemT]):
    """Items in a fixed order, each with the step and the time at which it is due next.

    At first all are due. After each use an item is asked when it is due next.

    Attributes:
        step: The smallest step at which one of them is due.
        time: The smallest time at which one of them is due.
    """

    def __init__(self, items: Iterable[ItemT]) -> None:
        self._entries = [_Entry(item) for item in items]
        self.step: float = math.inf
        self.time: float = math.inf
        self._find_earliest()

    def make_all_due(self) -> None:
        """Make all items due now."""
        for entry in self._entries:
            entry.step = -math.inf
        self._find_earliest()

    def take_due(self, step: int, time: float) -> Iterator[ItemT]:
        """Yield the items that are due. If the caller stops before the end, all of them stay due."""
        if step < self.step and time < self.time:
            return
        due = [entry for entry in self._entries if step >= entry.step or time >= entry.time]
        for entry in due:
            yield entry.item
        for entry in due:
            entry.step = entry.item.due_step(step)
            entry.time = entry.item.due_time()
        self._find_earliest()

    def _find_earliest(self) -> None:
        self.step = math.inf
        self.time = math.inf
        for entry in self._entries:
            self.step = min(self.step, entry.step)
            self.time = min(self.time, entry.time)
