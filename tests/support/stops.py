"""Parameters of which some are tested by default, and all with --faults."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def some_of(values: Iterable[object], *, every: int) -> list[object]:
    """Return the values. Without --faults only the first and each `every`-th after it are used."""
    return [
        value if number % every == 0 else pytest.param(value, marks=pytest.mark.faults)
        for number, value in enumerate(values)
    ]


def some_stops(last: int, *, every: int) -> list[object]:
    """Return the steps from 0 to the last one, after which a run is stopped.

    Without --faults only 0, 1, each `every`-th and the last two are used.
    """
    always = {0, 1, last - 1, last, *range(0, last, every)}
    return [
        stop if stop in always else pytest.param(stop, marks=pytest.mark.faults)
        for stop in range(last + 1)
    ]
