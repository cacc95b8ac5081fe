"""Putting arrays back, where a step of several updates fails between two of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from stepctl.arena import Arena
from stepctl.errors import TornUpdate


class Undo:
    """Copies of arenas, in memory that is used again."""

    def __init__(self) -> None:
        self._copies: dict[str, Arena] = {}

    @contextlib.contextmanager
    def on_error(self, arenas: Mapping[str, Arena]) -> Iterator[None]:
        """Give the arenas back the values that they have now if the block raises anything but TornUpdate.

        Processes that have the arenas in common all write the same values, so that none has to wait for another.
        """
        touched = {name for name, arena in arenas.items() if arena.touched}
        for name, arena in arenas.items():
            if name not in self._copies:
                self._copies[name] = arena.like()
            self._copies[name].copy_from(arena)
        try:
            yield
        except TornUpdate:
            raise  # others may be done with the step, and save it
        except BaseException:
            for name, arena in arenas.items():
                arena.copy_from(self._copies[name])
                arena.touched = name in touched
            raise
