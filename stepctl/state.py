"""The state of training: everything that changes and is saved. Data only; the trainer moves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from stepctl.arena import Arena, Array, all_finite, same_bits

GLOBAL_STEP = "global_step"
SAMPLES_SEEN = "samples_seen"
_LARGEST = 2**63 - 1


class Counters(Mapping[str, int]):
    """Named counts that only ever grow: `global_step`, `samples_seen`, and one per optimizer (int64 on disk).

    There is no setter. The trainer, and nothing else, calls `advance` once an update is complete.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        for required in (GLOBAL_STEP, SAMPLES_SEEN):
            if required not in values:
                raise ValueError(f"counter {required!r} is missing")
        for name, value in values.items():
            if not 0 <= value <= _LARGEST:
                raise ValueError(f"counter {name!r} is {value}: outside 0..2^63-1")
        self._values = dict(values)

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
        """Completed parameter updates since step 0, by anybody, in any process."""
        return self._values[GLOBAL_STEP]

    @property
    def samples_seen(self) -> int:
        """Training samples that those updates used; the position in the data."""
        return self._values[SAMPLES_SEEN]

    def advance(self, increments: Mapping[str, int]) -> None:
        """Count one completed update. For the trainer alone."""
        for name, increment in increments.items():
            if not 0 <= increment <= _LARGEST - self._values[name]:
                raise ValueError(f"counter {name!r} cannot go from {self._values[name]} by {increment}")
        for name, increment in increments.items():
            self._values[name] += increment


@dataclass
class TrainState:
    """All that an update may change.

    `optimizers` maps an optimizer's name to its slots (slot name -> arena of the parameters' layout);
    `buffers` holds the model's non-trainable arrays; `hooks` what each hook remembers.
    """

    counters: Counters
    params: Arena
    optimizers: dict[str, dict[str, Arena]]
    buffers: Arena
    hooks: dict[str, dict[str, Array]] = field(default_factory=dict)

    def arrays(self) -> dict[str, Array]:
        """Return every array but the counters by its path in a checkpoint, as live views."""
        found: dict[str, Array] = {f"params/{path}": array for path, array in self.params.items()}
        for name, slots in self.optimizers.items():
            for slot, arena in slots.items():
                found |= {f"optimizers/{name}/{slot}/{path}": array for path, array in arena.items()}
        found |= {f"buffers/{path}": array for path, array in self.buffers.items()}
        for name, values in self.hooks.items():
            found |= {f"hooks/{name}/{key}": array for key, array in values.items()}
        return found

    def hand_over(self) -> TrainState:
        """Return the state as it is now, which no update changes any more; only what is small is copied."""
        buffers = self.buffers.like()
        buffers.copy_from(self.buffers)
        return TrainState(
            counters=Counters(dict(self.counters)),
            params=self.params.hand_over(),
            optimizers={
                name: {slot: arena.hand_over() for slot, arena in slots.items()}
                for name, slots in self.optimizers.items()
            },
            buffers=buffers,
            hooks={name: {key: array.copy() for key, array in values.items()} for name, values in self.hooks.items()},
        )

    def first_non_finite(self) -> str | None:
        """Return the path of the first array that an update made NaN or infinite in part; hooks may hold such."""
        for path, array in self.arrays().items():
            if not path.startswith("hooks/") and not all_finite(array):
                return path
        return None

    def same_bits(self, other: TrainState) -> bool:
        """Tell whether both states are the same to the bit."""
        mine, theirs = self.arrays(), other.arrays()
        return (
            dict(self.counters) == dict(other.counters)
            and mine.keys() == theirs.keys()
            and all(same_bits(mine[path], theirs[path]) for path in mine)
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return int(np.sum([array.nbytes for array in self.arrays().values()], dtype=np.int64))
