"""Named int64 counters that only increase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

GLOBAL_STEP = "global_step"
SAMPLES_SEEN = "samples_seen"
_MAX = 2**63 - 1


class Counters(Mapping[str, int]):
    """The counters of a run: `global_step`, `samples_seen`, and one per optimizer (int64 on disk).

    There is no public setter. Only the trainer calls `advance`, when an update is complete.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        for required in (GLOBAL_STEP, SAMPLES_SEEN):
            if required not in values:
                raise ValueError(f"counter {required!r} is missing")
        self._set(values)

    def _set(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            if not 0 <= value <= _MAX:
                raise ValueError(f"counter {name!r} is {value}: outside 0..2^63-1")
        self._values = dict(values)
        self._previous = self._values

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Counters({self._values})"

    @property
    def global_step(self) -> int:
        """Completed updates since step 0, by any process."""
        return self._values[GLOBAL_STEP]

    @property
    def samples_seen(self) -> int:
        """Training samples that those updates used; the position in the data."""
        return self._values[SAMPLES_SEEN]

    def advance(self, increments: Mapping[str, int]) -> None:
        """Count one completed update. Only for the trainer."""
        for name, increment in increments.items():
            if not 0 <= increment <= _MAX - self._values[name]:
                raise ValueError(
                    f"counter {name!r} is {self._values[name]} and cannot increase by {increment}"
                )
        self._previous = dict(self._values)
        for name, increment in increments.items():
            self._values[name] += increment

    def previous(self, name: str) -> int:
        """Return a counter's value before the last update; before the first, its current value."""
        return self._previous[name]
