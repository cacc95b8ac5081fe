"""Restoring arrays when a step fails between two of its updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from stepctl.errors import TornUpdate
from stepctl.state.arena import Arena


class Undo:
    """Copies of arenas, in buffers that are reused."""

    def __init__(self) -> None:
        self._copies: dict[str, Arena] = {}

    @contextlib.contextmanager
    def on_error(self, arenas: Mapping[str, Arena]) -> Iterator[None]:
        """Restore the present values of the arenas if the block raises anything but TornUpdate.

        Ranks that share the memory of the arenas all write the same values, so none has to wait for
        another.
        """
        modified = {name for name, arena in arenas.items() if arena.modified}
        for name, arena in arenas.items():
            if name not in self._copies:
                self._copies[name] = arena.like()
            self._copies[name].copy_from(arena)
        try:
            yield
        except TornUpdate:
            raise  # other ranks may have completed the step, and save it
        except BaseException:
            for name, arena in arenas.items():
                arena.copy_from(self._copies[name])
                arena.modified = name in modified
            raise
