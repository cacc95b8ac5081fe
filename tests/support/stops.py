"""The steps after which a run is stopped: some by default, all with --faults."""

from __future__ import annotations

import pytest


def some_stops(last: int, *, every: int) -> list[object]:
    """Return the steps from 0 to the last one.

    Without --faults only 0, 1, each `every`-th and the last two are used.
    """
    always = {0, 1, last - 1, last, *range(0, last, every)}
    return [
        stop if stop in always else pytest.param(stop, marks=pytest.mark.faults)
        for stop in range(last + 1)
    ]
